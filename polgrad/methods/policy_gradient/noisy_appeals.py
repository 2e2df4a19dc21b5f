from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def noisy_appeals(
  *, false_positive: float = 0.0, checked: float = 1.0, decay: float = 0.95
) -> Method:
  """Backward correction with appeals (arXiv:2510.00915): the rate of false negatives is measured.

      R_i = (r_i - false_positive) / (1 - false_positive - q),   r_i 0 or 1
      q = m / (m + a), m rejected rows whose appeal succeeded, a accepted rows, both decayed counts
      A_i = R_i - mean of the other rows of the group
      loss = -mean over sequences of A_i log pi(y_i)

  An appeal is a second verifier, the term `appeal` of the reward with weight 0. It is slower and better
  than the one that rewards, a judge for example. By default it compares final numbers, while the task's
  verifier may want exact text.

  Differences: The paper asks a language model about rejected answers alone; a term of the reward is
  asked about all. The smoothing of the counts is ours.

  Args:
    false_positive: share of wrong answers that the verifier accepts; it must be known.
    checked: share of the rejected rows that are appealed; the term of the others is 0.
    decay: of the counts, per batch.

  Confidence: PAPER (estimator), DERIVED (counts).
  """
  return Method(
    collect=partial(collect.Rollouts, terms=('appeal',)),
    credit=part(
      credit.appealed,
      credit=part(credit.outcome, advantage=part(advantages.leave_one_out)),
      false_positive=false_positive,
      checked=checked,
      decay=decay,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    rewards={'appeal': weighted(0.0, part(verifiers.numeric_answer))},
  )
