from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def tis(*, eps_low: float = 0.2, eps_high: float = 0.28, cap: float = 2.0) -> Method:
  """TIS (Yao et al. 2025; idea: arXiv:2505.24034): truncated weights for the sampler's mismatch.

      loss = -token mean of sg(min(rho, cap)) min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  rho = pi_old / pi_behavior, r = pi / pi_old, and A is the group-normalised reward. pi_behavior is
  the policy that sampled, and pi_old the policy when training on the rollout begins. The weight
  multiplies the loss, never the reward. It is that of the note "Your Efficient RL Framework
  Secretly Brings You Off-Policy RL Training", which has no arXiv number. LlamaRL (arXiv:2505.24034)
  truncates pi / pi_behavior, one ratio in the place of both.

  Differences: Rollouts are four batches old (lag=4). Sampler and trainer run the same model here,
  so this age is what makes pi_old and pi_behavior differ.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    cap: largest importance weight.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.truncated_importance, cap=cap)},
    ),
    minibatches=2,
  )
