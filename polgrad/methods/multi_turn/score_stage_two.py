from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def score_stage_two(*, bonus: float = 10.0, kl_coefficient: float = 0.01) -> Method:
  """SCoRe, stage II (arXiv:2409.12917): both answers, with a bonus for a correction.

      loss = -mean over sequences of (A_1 log pi(turn 1) + A_2 log pi(turn 2)) + kl_coefficient k2
      A_1 = r_1 - mean over the others,   A_2 = x - mean over the others,   x = r_2 + bonus (r_2 - r_1)

  With rewards 0 and 1 and the default bonus, x is 11 for an answer that was corrected, -10 for one that
  was spoilt, and r_2 where both are equal. The bonus is credited to turn 2 alone; if turn 1 had it too,
  its own reward would count 1 - bonus times, and it would pay to fail first. k2 = (log pi - log
  reference)^2 / 2, summed over the tokens of both turns.

  Differences: The paper leaves the baseline open. A third-party implementation has k3 and means over
  tokens. A third turn is compared with the second, and so on.

  Args:
    bonus: alpha in the paper; 0 reinforces each turn by its own reward.
    kl_coefficient: beta_1 in the paper.

  Confidence: PAPER (objective), MEMORY (constants).
  """
  return Method(
    credit=part(
      credit.self_correction, advantage=part(advantages.leave_one_out), bonus=bonus, first_turn=True
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k2))},
    ),
    anchors={'reference': part(optim.fixed)},
  )
