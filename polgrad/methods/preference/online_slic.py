from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def online_slic(*, beta: float = 0.002) -> Method:
  """Online SLiC (arXiv:2402.04792): the hinge loss on two samples of the policy.

      loss = mean over pairs of max(0, 1 - beta h)
      h = log(pi / reference)(better) - log(pi / reference)(worse)

  The log-ratios are sums over the tokens of an answer. The better answer is the one that wins with a
  probability above one half; a tie is left out. The phase's `comparison` gives that probability.

  Args:
    beta: multiplies the difference of the log-ratios.

  Confidence: PAPER (form), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2, compare=('wins',)),
    credit=part(credit.compared, label='better'),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.hinge),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
