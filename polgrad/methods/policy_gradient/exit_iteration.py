from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, multipliers, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def exit_iteration(
  *,
  new: float = 0.5,
  divergence: float = 0.2,
  diversity: float = 0.0,
  capacity: int = 256,
  shown: int = 1,
  eps: float = 0.2,
) -> Method:
  """ExIt (arXiv:2509.04575): GRPO that starts again from the attempts at which it learns most.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
      A    = (R - mean_g) / (std_g + 1e-6), times 1 + diversity (d / mean_g d - 1)

  A group starts from a data row with probability `new`, and otherwise from an entry of a buffer: a data
  row with an earlier attempt at it, which the prompt shows and asks to improve. Entries are drawn
  proportionally to the variance of the rewards of their group. A random completion of each group makes a
  further entry. r = pi / pi_old, and d is the distance of a completion from the mean of its group, of
  vectors of counts of its tokens. With probability `divergence` a group with an attempt is asked for a
  different answer instead of a better one.

  Differences: The structure is from an account of the paper. The constants, which completion is
  appended, the words of the requests and the form of the factor with d are ours; the paper embeds
  completions by a model.

  Args:
    new: probability that a group starts from a data row; 1 is GRPO.
    divergence: probability that an attempt is to be answered differently.
    diversity: how much distances within the group change advantages; 0 is not at all.
    capacity: entries of the buffer.
    shown: attempts that a prompt shows, the last ones.
    eps: distance of the clipping bounds from 1.

  Confidence: PAPER (structure, second-hand), MEMORY (the rest).
  """
  return Method(
    collect=partial(
      collect.Iterated, new=new, divergence=divergence, capacity=capacity, shown=shown
    ),
    credit=part(
      credit.scaled,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      multiplier=part(multipliers.different, strength=diversity),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
