from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_one_side_is(*, low: float = 0.4, high: float = 3.0) -> Method:
  """REC-OneSide-IS (arXiv:2509.24203): REC-OneSide with importance weights, or GRPO without std.

      loss = -token mean of 1[(A >= 0 and r <= high) or (A <= 0 and r >= low)] r A

  A = R - group mean and r = pi / pi_old. The gradient is that of PPO at these bounds.

  Differences: The published code detaches r and multiplies it by log pi, which changes the value of
  the loss and not its gradient. Rollouts are four batches old (lag=4), and pi_old is the policy
  that sampled them.

  Args:
    low: smallest ratio of a token with A < 0 that is kept.
    high: largest ratio of a token with A > 0 that is kept.

  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.one_sided, low=low, high=high)},
    ),
    minibatches=4,
  )
