from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def score_stage_one(*, kl_coefficient: float = 0.1) -> Method:
  """SCoRe, stage I (arXiv:2409.12917): learn to correct a first answer that is held near the reference.

      loss = -mean over sequences of A_2 log pi(turn 2) + kl_coefficient k2(turn 1)
      A_2 = r_2 - mean of r_2 over the other rows of the group

  Turn 1 is an answer, turn 2 another one after a request to correct it. Only turn 2 is reinforced, and
  the KL holds turn 1 near the reference, so the policy cannot learn to answer at once and then repeat
  itself. k2 = (log pi - log reference)^2 / 2, summed over the tokens of turn 1: on samples of the policy
  its gradient is that of KL(pi || reference) for each token. `score_stage_two` follows.

  Differences: The paper leaves the baseline open. A third-party implementation has k3 and means over
  tokens.

  Args:
    kl_coefficient: of the KL of turn 1, beta_2 in the paper (0.25 for code).

  Confidence: PAPER (objective), MEMORY (kl_coefficient).
  """
  return Method(
    credit=part(
      credit.self_correction,
      advantage=part(advantages.leave_one_out),
      bonus=0.0,
      first_turn=False,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
      penalties={'kl': weighted(kl_coefficient, part(penalties.turn_k2, turn=0))},
    ),
    anchors={'reference': part(optim.fixed)},
  )
