from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def arpo(
  *, beta: float = 0.1, nll_coefficient: float = 1.0, scale: float = 0.9, rate: float = 0.4
) -> Method:
  """ARPO (arXiv:2410.03115): CPO that pushes the rejected completion down less if it is as likely.

      loss = mean over pairs of softplus(-beta (log pi(chosen) - c log pi(rejected)))
             - nll_coefficient (mean over chosen rows of l_w)
      c = min(1, scale exp(rate |l_w - l_l|) - 1)

  l_w and l_l are the mean log-probs per token of the chosen and the rejected completion. c carries
  gradient, and is scale - 1, that is -0.1, where both means are equal: then both rows are pulled up.

  Differences: the likelihood is averaged over rows, as in `cpo`.

  Args:
    beta: multiplies the difference of the log-probs.
    nll_coefficient: of the negative log-likelihood of the chosen completion.
    scale: of the exponential in c.
    rate: of the exponential in c, per nat and token.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.WeightedSum,
      streams={
        'preference': weighted(
          1.0,
          part(
            objectives.Pairwise,
            score=part(implicit_rewards.logp_sum),
            link=part(preference_losses.logistic),
            shape=part(score_shapes.adaptive_rejection, scale=scale, rate=rate),
            beta=beta,
          ),
        ),
        'likelihood': weighted(
          nll_coefficient,
          part(
            objectives.Supervised, aggregation=part(aggregation.sequence_mean), preferred_only=True
          ),
        ),
      },
    ),
  )
