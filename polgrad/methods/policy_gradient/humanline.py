from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def humanline(
  *, eps: float = 0.15, low: float = -1.0, high: float = 1.5, kl_coefficient: float = 0.01
) -> Method:
  """Humanline GRPO (arXiv:2509.24207): clamped log-ratios, and a reference that follows the policy.

      loss = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient k3
      log r = clip(log pi - log pi_old, low, high)

  A = (R - mean) / (std + 0.01) in the group, and k3 is the penalty of `grpo`. A token outside the
  clamp has no gradient, whatever its advantage. pi_old, and the reference in k3, are the policy
  when training on the rollout begins, so an old row is treated like a fresh one.

  Differences: eps is that of the authors' online run, which does not read the 0.01 of their
  configuration. Rollouts are four batches old (lag=4). The reference is computed once per rollout, so
  it is up to as many updates old as a rollout has, instead of one.

  Args:
    eps: distance of the clipping bounds from 1.
    low: smallest log-ratio of a token, in nats.
    high: largest log-ratio of a token, in nats.
    kl_coefficient: of the KL to the reference.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, recompute_proximal=True, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=0, eps=0.01)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      ratio=part(ratios.clamped, low=low, high=high),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k3))},
    ),
    anchors={'reference': part(optim.sync, every=1)},
    minibatches=4,
  )
