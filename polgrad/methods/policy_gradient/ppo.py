from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def ppo(
  *,
  eps: float = 0.2,
  discount: float = 1.0,
  trace: float = 0.95,
  value_coefficient: float = 0.5,
  entropy_coefficient: float = 0.001,
) -> Method:
  """PPO (arXiv:1707.06347): clipped ratios and a value head, advantages by GAE (arXiv:1506.02438).

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
             + value_coefficient (clipped value error) - entropy_coefficient (entropy)

  r = pi / pi_old, and A is whitened over the batch. The value error is the larger of (V - G)^2 / 2
  at V and at clip(V, V_old - eps, V_old + eps), with G the return. A rollout is used for two epochs
  of two minibatches. The value head reads the hidden states of the policy.

  Args:
    eps: distance of the clipping bounds from 1, and of those of the value from V_old.
    discount: of rewards, per token.
    trace: lambda of GAE.
    value_coefficient: of the value error.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE (formula as in verl).
  """
  return Method(
    credit=part(
      credit.generalized, discount=discount, trace=trace, normalizer=part(advantages.whiten)
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps)),
        'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy)),
      },
    ),
    epochs=2,
    minibatches=2,
  )
