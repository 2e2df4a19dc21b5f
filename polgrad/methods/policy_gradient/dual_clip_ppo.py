from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dual_clip_ppo() -> Method:
  """Dual-clip PPO (arXiv:1912.09729): PPO whose loss is bounded for bad tokens, too.

  loss = token mean of max(-r A, -clip(r, 0.8, 1.2) A), and at most -3 A where A < 0, + 0.5 * clipped
  value error. The gradient of a bad token ends at r = 3. GAE and value head as in `ppo.py`; four
  minibatches in two epochs let ratios go that far. No entropy bonus.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.generalized, discount=1.0, trace=0.95, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=0.2, eps_high=0.2, cap=3.0),
      aggregation=part(aggregation.token_mean),
      penalties={'value': weighted(0.5, part(penalties.clipped_value_error, eps=0.2))},
    ),
    epochs=2,
    minibatches=4,
  )
