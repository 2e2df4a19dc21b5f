from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def self_play_spo() -> Method:
  """SPO (arXiv:2401.04056): the reward of an answer is its win rate against the others of its group.

      loss = -mean over rows of A log pi(y)
      A = r - mean of r over the other rows,   r = mean over the others y' of P(y beats y')

  The average of the policies approaches the minimax winner of the game, also where preferences are not
  transitive; the last policy may cycle. The phase's `comparison` gives P.

  Differences: The paper runs PPO and SAC on control tasks. Here the advantage is that of RLOO, and any
  other `credit` and surrogate may take its place.

  Confidence: PAPER (rewards), DERIVED (with RLOO on language models).
  """
  leave_one_out = part(credit.outcome, advantage=part(advantages.leave_one_out))
  return Method(
    collect=partial(collect.Rollouts, compare=('wins',)),
    credit=part(credit.of_wins, credit=leave_one_out),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
