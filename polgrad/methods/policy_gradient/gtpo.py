from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gtpo(
  *, factor: float = 2.0, entropy_limit: float = 0.7, entropy_penalty: float = 0.1
) -> Method:
  """GTPO (arXiv:2508.03772): tokens that good and bad rows share are not pushed down.

      loss = -mean over sequences of the mean over tokens of w_t A' r
      A' = A - entropy_penalty H where H <= entropy_limit, else 0;   A = reward - mean of the group

  r = pi / sg(pi) = 1, so this is REINFORCE. H is the mean entropy of the tokens of the row, nats. A
  token is shared if a row of the prompt with A > 0 and one with A < 0 have it at the same place. The
  shared tokens that a row begins with are in conflict, and so are those that it ends with, where places
  count from the end. w_t is `factor` for conflicting tokens of good rows (its square for those that are
  both), 0 for those of bad rows, and 1 elsewhere. There is no KL and no reference.

  Differences: The released code also divides each row by the number of its conflicting tokens, and sums
  over rows; the README's formula, which is this one, does not. The paper's gate, which depends on the
  entropy of the initial policy, is a fixed limit in the code and here.

  Args:
    factor: weight of conflicting tokens of good rows.
    entropy_limit: largest H of a row that is trained on; about ln 2.
    entropy_penalty: gamma in the paper.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, stats={'old_entropy': part(logit_stats.entropy)}),
    credit=part(
      credit.conflict_aware,
      advantage=part(advantages.group_mean),
      factor=factor,
      entropy_limit=entropy_limit,
      entropy_penalty=entropy_penalty,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_mean),
    ),
  )
