from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_one_side_is() -> Method:
  """REC-OneSide-IS (arXiv:2509.24203): REC-OneSide with importance weights, which is GRPO without the std.

  loss = -token mean of 1[(A >= 0 and r <= 3) or (A <= 0 and r >= 0.4)] r A, r = pi / pi_old, A = R -
  group mean: PPO's gradient at these bounds. The published code detaches r and multiplies log pi,
  which changes the value and not the gradient. Ours: rollouts are four batches old, and pi_old is the
  policy that sampled.
  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.one_sided, low=0.4, high=3.0)},
    ),
    minibatches=4,
  )
