from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def turn_rloo(*, discount: float = 1.0) -> Method:
  """RLOO of turns (arXiv:2402.14740): a turn is compared with the same turn of the other samples.

      loss = -mean over sequences of sum_k A_k log pi(turn k)
      A_k = R_k - mean of R_k over the other samples that have a turn k,   R_k = r_k + discount R_{k+1}

  The baseline of a turn does not depend on that turn, and no turn is credited with earlier rewards. So
  the estimate of the gradient of E[sum of r] is unbiased for `discount` 1 if all rows have the same
  number of turns.

  Differences: The paper has one turn. A turn that no other sample has gets no credit, which is a bias
  where rows differ in their number of turns.

  Args:
    discount: of rewards, per turn.

  Confidence: DERIVED.
  """
  return Method(
    credit=part(
      credit.turn_returns,
      advantage=part(advantages.leave_one_out),
      discount=discount,
      among='number',
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
