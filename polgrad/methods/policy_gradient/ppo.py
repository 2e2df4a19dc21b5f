from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def ppo() -> Method:
  """PPO (arXiv:1707.06347): clipped ratios and a value head, advantages by GAE (arXiv:1506.02438).

  loss = -token mean of min(r A, clip(r) A) + 0.5 * clipped value error - 0.001 * entropy; two epochs
  of two minibatches. The value head reads the policy's own hidden states.
  Confidence: CODE (formula as in verl).
  """
  return Method(
    credit=part(credit.generalized, discount=1.0, trace=0.95, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(0.5, part(penalties.clipped_value_error, eps=0.2)),
        'entropy': weighted(0.001, part(penalties.negative_entropy)),
      },
    ),
    epochs=2,
    minibatches=2,
  )
