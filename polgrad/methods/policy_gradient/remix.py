from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def remix(
  *,
  eps: float = 0.2,
  kl_coefficient: float = 0.01,
  replay_fraction: float = 0.4,
  base_every: int = 50,
) -> Method:
  """ReMix (arXiv:2507.06892): replayed rows keep their ratio, in a trust region around the policy.

      loss = -token mean of min(r A, clip(r, c - eps, c + eps) A)
             + kl_coefficient [lam KL(pi || base) + (1 - lam) KL(pi || pi_old)]

  r = pi / behavior and c = pi_old / behavior, where `behavior` is the policy that sampled the row
  and pi_old the policy when training on the rollout begins. A is the group-normalised reward. A
  fraction of the groups comes from the last two rollouts. A rollout is used for two epochs. lam is
  1 for `base_every` rollouts and then falls by 0.1 every 10 rollouts, down to 0.5. The base is a
  copy of the policy that is renewed every `base_every` rollouts.

  Differences: Both KLs are estimated by k2, and `kl_coefficient` is our choice. The mixture
  continues to the end, whereas the paper changes to on-policy GRPO after 50 or 100 steps.

  Args:
    eps: distance of the clipping bounds from c.
    kl_coefficient: of the mixture of both KLs.
    replay_fraction: fraction of the groups of a batch that are replayed.
    base_every: rollouts between copies of the policy to the base; also the rollouts with lam = 1.

  Confidence: PAPER (method, schedule), MEMORY (eps, estimator of KL).
  """
  epochs = 2  # schedules and anchors count updates, of which a rollout has one per epoch
  fall = {'begin': base_every * epochs, 'every': 10 * epochs, 'height': 0.1}
  return Method(
    collect=partial(
      collect.Rollouts, replay=2, replay_fraction=replay_fraction, recompute_proximal=True
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.centered_clip, eps=eps),
      aggregation=part(aggregation.token_mean),
      penalties={
        'base': weighted(kl_coefficient, part(penalties.k2)),
        'old': weighted(kl_coefficient, part(penalties.squared_log_ratio)),
      },
      schedules={
        'base': part(optim.stairs, first=1.0, last=0.5, **fall),
        'old': part(optim.stairs, first=0.0, last=0.5, **fall),
      },
    ),
    anchors={'reference': part(optim.sync, every=base_every * epochs)},
    epochs=epochs,
  )
