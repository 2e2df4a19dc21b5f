from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_two_side() -> Method:
  """REC-TwoSide (arXiv:2509.24203): off-policy REINFORCE on the tokens whose ratio is near 1.

  loss = -token mean of 1[0.8 <= r <= 1.2] A log pi, r = pi / pi_old, A = R - group mean. Unlike the
  one-sided mask it also drops tokens that moved against their advantage. Ours: rollouts are four
  batches old, and pi_old is the policy that sampled.
  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.two_sided, low=0.8, high=1.2)},
    ),
    minibatches=4,
  )
