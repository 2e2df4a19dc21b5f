from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dual_clip_ppo(
  *, eps: float = 0.2, cap: float = 3.0, trace: float = 0.95, value_coefficient: float = 0.5
) -> Method:
  """Dual-clip PPO (arXiv:1912.09729): PPO whose loss is bounded for bad tokens, too.

      loss = token mean of L + value_coefficient (clipped value error)
      L = -min(r A, clip(r, 1 - eps, 1 + eps) A), and at most -cap A where A < 0

  r = pi / pi_old, and A is the estimate of GAE, whitened over the batch. A bad token has no
  gradient where r > cap. The value error is that of `ppo`. There is no entropy bonus. A rollout is
  used for two epochs of four minibatches, which let ratios reach the cap.

  Args:
    eps: distance of the clipping bounds from 1, and of those of the value from V_old.
    cap: largest ratio itself where A < 0, above 1.
    trace: lambda of GAE.
    value_coefficient: of the value error.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.generalized, discount=1.0, trace=trace, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=eps, eps_high=eps, cap=cap),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps))
      },
    ),
    epochs=2,
    minibatches=4,
  )
