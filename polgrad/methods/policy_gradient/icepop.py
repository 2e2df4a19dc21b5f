from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def icepop(*, eps: float = 0.2, low: float = 0.5, high: float = 5.0) -> Method:
  """IcePop (arXiv:2510.18855): tokens on which sampler and trainer disagree are dropped.

      loss = -token mean of sg(rho 1[low <= rho <= high]) min(r A, clip(r, 1 - eps, 1 + eps) A)

  rho = pi_old / pi_behavior, r = pi / pi_old, and A is the group-normalised reward. pi_behavior is
  the policy that sampled, and pi_old the policy when training on the rollout begins. A token
  outside the band is dropped, not truncated, and still counts in the denominator.

  Differences: Rollouts are four batches old (lag=4). Sampler and trainer run the same model here,
  so this age is what makes pi_old and pi_behavior differ.

  Args:
    eps: distance of the clipping bounds from 1.
    low: smallest ratio rho of a token that is kept.
    high: largest ratio rho of a token that is kept.

  Confidence: CODE (formula), MEMORY (bounds).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.masked_importance, low=low, high=high)},
    ),
    minibatches=2,
  )
