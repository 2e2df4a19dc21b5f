from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def humanline() -> Method:
  """Humanline GRPO (arXiv:2509.24207): clamped log-ratios, and a reference that follows.

  loss = token mean of -min(r A, clip(r, 0.99, 1.01) A) + 0.01 k3(pi, reference), log r = clip(log pi
  - log pi_old, -1, 1.5), A = (R - mean) / (std + 0.01) in the group. A token outside the clamp has
  no gradient, whatever its advantage. Rows are 4 rollouts old and treated as if they were fresh:
  ratio and reference are those of the policy when the rollout began. Ours: the reference is read
  once a rollout, so it lags as many updates as a rollout has, not one.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, recompute_proximal=True, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=0, eps=0.01)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.01, eps_high=0.01),
      ratio=part(ratios.clamped, low=-1.0, high=1.5),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(0.01, part(penalties.k3))},
    ),
    anchors={'reference': part(optim.sync, every=1)},
    minibatches=4,
  )
