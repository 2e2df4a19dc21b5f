from polgrad import credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part


def spiral(
  *, max_new_tokens: int, eps: float = 0.2, roles: AtLeastOne = 2, decay: float = 0.95
) -> Method:
  """SPIRAL (arXiv:2506.24119): self-play in which each role has its own baseline.

      loss = -(sum over tokens of min(r A, clip(r, 1 - eps, 1 + eps) A)) / (rows max_new_tokens)
      A = R_p - b_p in the turns of player p

  r = pi / pi_old. One policy plays all roles; a row holds the turns of all of them. R_p is the sum of
  the rewards of player p in the row, and b_p its moving average. With one baseline for all, the role
  that the game favours would always be reinforced.

  Differences: The average is taken once a batch, over its rows, and before the batch is added to it;
  the paper updates it with every game and has one for each kind of game. There is no filter of draws.

  Args:
    max_new_tokens: largest number of tokens of a row; the run fills it in.
    eps: distance of the clipping bounds from 1.
    roles: number of players.
    decay: of the moving averages, per batch.

  Confidence: CODE (decay), PAPER (baseline), MEMORY (loss).
  """
  return Method(
    credit=part(credit.self_play, players=roles, decay=decay),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.constant_length, length=max_new_tokens),
    ),
    minibatches=2,
  )
