from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def rec_one_side() -> Method:
  """REC-OneSide (arXiv:2509.24203): off-policy REINFORCE with a trust region and no importance weights.

  loss = -token mean of 1[(A >= 0 and r <= 3) or (A <= 0 and r >= 0.4)] A log pi, r = pi / pi_old, A =
  R - group mean. The bounds are the paper's wide ones (eps 0.6 and 2); its narrow ones are 0.8 and
  1.2. Ours: rollouts are four batches old and cut into four minibatches, and pi_old is the policy
  that sampled.
  Confidence: CODE (mask and bounds), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.one_sided, low=0.4, high=3.0)},
    ),
    minibatches=4,
  )
