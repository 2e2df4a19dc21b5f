from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def remix() -> Method:
  """ReMix (arXiv:2507.06892): replayed rows keep their ratio, in a trust region around the policy.

  loss = token mean of -min(r A, clip(r, c - 0.2, c + 0.2) A) + beta [lam KL(pi || base) + (1 - lam)
  KL(pi || pi_old)], r = pi / behavior, c = pi_old / behavior, pi_old the policy when the rollout
  began. 0.4 of the groups come from the last two rollouts; two epochs. lam is 1 for 50 rollouts,
  then falls by 0.1 every 10 to 0.5; the base becomes the policy after every 50. Ours: k2 for both
  KL, beta = 0.01, and the mixture goes on where the paper changes to on-policy GRPO after 50 or 100
  steps.

  Confidence: PAPER (method, schedule), MEMORY (eps, estimator of KL).
  """
  epochs, beta = 2, 0.01
  fall = {'begin': 50 * epochs, 'every': 10 * epochs, 'height': 0.1}
  return Method(
    collect=partial(collect.Rollouts, replay=2, replay_fraction=0.4, recompute_proximal=True),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.centered_clip, eps=0.2),
      aggregation=part(aggregation.token_mean),
      penalties={
        'base': weighted(beta, part(penalties.k2)),
        'old': weighted(beta, part(penalties.squared_log_ratio)),
      },
      schedules={
        'base': part(optim.stairs, first=1.0, last=0.5, **fall),
        'old': part(optim.stairs, first=0.0, last=0.5, **fall),
      },
    ),
    anchors={'reference': part(optim.sync, every=50 * epochs)},
    epochs=epochs,
  )
