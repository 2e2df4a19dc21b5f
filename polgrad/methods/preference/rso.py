from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def rso(*, gamma: float = 0.05) -> Method:
  """RSO (arXiv:2309.06657): the hinge loss on normalised log-ratios, of statistical rejection sampling.

      loss = mean over pairs of max(0, 1 - gamma h)
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  Differences: the paper makes its pairs itself: of 64 samples of the supervised model it keeps those
  that rejection sampling accepts, with the probability exp((reward - largest reward) / beta), and a
  reward model labels them. Here the pairs are those of the data.

  Args:
    gamma: multiplies the difference of the log-ratios.

  Confidence: PAPER (formula), MEMORY (constants of the sampler).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.hinge),
      beta=gamma,
    ),
    anchors={'reference': part(optim.fixed)},
  )
