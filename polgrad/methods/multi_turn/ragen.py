from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def ragen(
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.28,
  discount: float = 1.0,
  trace: float = 1.0,
  turn_discount: float = 0.95,
  value_coefficient: float = 0.5,
) -> Method:
  """RAGEN with bi-level GAE (arXiv:2504.20073): advantages over turns, then over tokens of a turn.

      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
             + value_coefficient (clipped value error)

  r = pi / pi_old. GAE with `turn_discount`, in which a step is a turn, gives the return R_k of turn k
  from the rewards of turns and the values at their ends. GAE over the tokens of turn k then has the
  reward R_k at its last token, and no value after it. A is whitened over the batch; the targets of the
  critic are A before that plus V.

  Differences: Turns are those of the batch. The released code finds their ends as rewards other than 0,
  and has this credit off by default. Its choice of groups by the deviation of their rewards and its
  penalty of unreadable turns are left to the collector and the environment.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1, and of both bounds of the value from V_old.
    discount: of rewards and values, per token of a turn.
    trace: lambda of both levels.
    turn_discount: of rewards and values, per turn.
    value_coefficient: of the value error.

  Confidence: CODE (advantages), MEMORY (bounds, value_coefficient).
  """
  return Method(
    credit=part(
      credit.bilevel_generalized,
      discount=discount,
      trace=trace,
      turn_discount=turn_discount,
      normalizer=part(advantages.whiten),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps_high)),
      },
    ),
    minibatches=2,
  )
