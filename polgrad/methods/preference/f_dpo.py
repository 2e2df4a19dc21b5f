from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part, suggest


def f_dpo(*, divergence: str = 'jensen_shannon', beta: float = 0.0, alpha: float = 0.5) -> Method:
  """f-DPO (arXiv:2309.16240): DPO with another f-divergence than the reverse KL to the reference.

      loss = mean over pairs of softplus(-beta (f'(u_w) - f'(u_l))), u = pi / reference

  u is that of the whole completion. The best policy for a reward has reward = beta f'(u) + constant, so
  the difference of f'(u) is an implicit reward margin. Constants of f' cancel.

  | divergence | f'(u) | beta of the released runs |
  |---|---|---|
  | `reverse_kl` | log u: DPO | 0.9 |
  | `forward_kl` | -1 / u | 0.03 |
  | `jensen_shannon` | log(2 u / (1 + u)) | 0.3 |
  | `alpha` | (1 - u^(-alpha)) / alpha | 0.3 |
  | `chi_square_kl` | u + log u, as in chiPO | none; 0.1 is our choice |

  Differences: log u is clamped to +-20 nats in exponentials, where TRL has 80. TRL's alpha is 1 - alpha.

  Args:
    divergence: one of the table.
    beta: coefficient of the divergence; 0 takes that of the table.
    alpha: of the alpha-divergence, in (0, 1): near 0 the reverse KL, at 1 the forward KL.

  Raises:
    ValueError: an unknown divergence.

  Confidence: CODE.
  """
  shapes = {
    'reverse_kl': (part(score_shapes.identity), 0.9),
    'forward_kl': (part(score_shapes.forward_kl), 0.03),
    'jensen_shannon': (part(score_shapes.jensen_shannon), 0.3),
    'alpha': (part(score_shapes.alpha_divergence, alpha=alpha), 0.3),
    'chi_square_kl': (part(score_shapes.chi_square_kl), 0.1),
  }
  if divergence not in shapes:
    raise ValueError(f'unknown divergence {divergence!r}{suggest(divergence, shapes)}')
  shape, usual = shapes[divergence]
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      shape=shape,
      beta=beta or usual,
    ),
    anchors={'reference': part(optim.fixed)},
  )
