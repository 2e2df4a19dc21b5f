from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_ring() -> Method:
  """REC-Ring (arXiv:2509.24203): tokens near the old policy, and those that went far the wrong way.

  loss = -token mean of K A log pi, A = R - group mean, r = pi / pi_old, and K = 1 if 0.8 <= r <= 1.2,
  or A >= 0 and r <= 0.4, or A <= 0 and r >= 3; else 0. Good tokens that became unlikely are pulled
  back up, bad ones that became likely back down. Ours: rollouts are four batches old, and pi_old is
  the policy that sampled.
  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.ring, low=0.8, high=1.2, outer_low=0.4, outer_high=3.0)},
    ),
    minibatches=4,
  )
