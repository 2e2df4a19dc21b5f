from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def mis(*, eps_low: float = 0.2, eps_high: float = 0.28, limit: float = 3.0) -> Method:
  """MIS (standard; as in TRL and verl): rows that the sampler found far less likely are dropped.

      loss = -token mean of sg(R 1[R <= limit]) min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  R = prod_t pi_old / pi_behavior is the ratio of the whole row, r = pi / pi_old that of a token,
  and A the group-normalised reward. pi_behavior is the policy that sampled, and pi_old the policy
  when training on the rollout begins. Dropped rows still count in the denominator. The variant that
  drops tokens is IcePop (arXiv:2510.18855).

  Differences: Rollouts are four batches old (lag=4). Sampler and trainer run the same model here,
  so this age is what makes pi_old and pi_behavior differ.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    limit: largest ratio R of a row that is kept.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.masked_sequence_importance, low=0.0, high=limit)},
    ),
    minibatches=2,
  )
