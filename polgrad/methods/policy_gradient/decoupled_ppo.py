from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def decoupled_ppo(*, eps: float = 0.2, cap: float = 5.0) -> Method:
  """Decoupled PPO (arXiv:2505.24298; idea: 2110.00641): trust region around a recent policy.

      loss = -token mean of sg(min(rho, cap)) min(r A, clip(r, 1 - eps, 1 + eps) A)

  r = pi / pi_prox, rho = pi_prox / pi_behavior, and A is the group-normalised reward. pi_behavior
  is the policy that sampled, and pi_prox the policy when training on the rollout begins. So old
  data are reweighted, and only steps away from the recent policy are clipped.

  Differences: Rollouts are four batches old (lag=4). The formula of the paper has no cap. AReaL's
  code has one and drops the tokens above it, which is the weight `masked_importance`, low=0,
  high=5; here their weight is truncated, as in its other mode.

  Args:
    eps: distance of the clipping bounds from 1.
    cap: largest importance weight.

  Confidence: CODE (formula), MEMORY (cap).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      weights={'behavior': part(weights.truncated_importance, cap=cap)},
    ),
    minibatches=4,
  )
