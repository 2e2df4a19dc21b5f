from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def turn_ppo(
  *,
  eps: float = 0.2,
  discount: float = 1.0,
  trace: float = 0.95,
  value_coefficient: float = 0.5,
) -> Method:
  """Turn-PPO (arXiv:2511.20718): PPO whose steps are turns, in advantages and in ratios.

      loss = -token mean of min(s A, clip(s, 1 - eps, 1 + eps) A)
             + value_coefficient (clipped value error)
      s = exp(mean over the turn of log pi - log pi_old)

  A is GAE over turns, with the critic at the first token of each, whitened over the batch. All tokens
  of a turn have its A, its s and its target A + V (before whitening).

  Differences: The value error is that of every token, so the critic learns the return of a turn from
  inside it as well.

  Args:
    eps: distance of the clipping bounds from 1, and of those of the value from V_old.
    discount: of rewards and values, per turn.
    trace: lambda of GAE, per turn.
    value_coefficient: of the value error.

  Confidence: MEMORY.
  """
  return Method(
    credit=part(
      credit.turn_generalized, discount=discount, trace=trace, normalizer=part(advantages.whiten)
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      ratio=part(ratios.turn_geometric),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps)),
      },
    ),
    minibatches=2,
  )
