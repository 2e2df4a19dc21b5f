from polgrad.methods.base import Method
from polgrad.methods.preference.bond import bond
from polgrad.registry import AtLeastOne


def vbon(*, n: AtLeastOne = 8) -> Method:
  """Variational best of n (arXiv:2407.06057): maximise E[(n - 1) log F(y)] - KL(pi, reference).

      loss = -(n - 1) mean of A log pi(y) + mean of K log pi(y)

  A, K and F are those of `bond`, of which this is the backward divergence alone. The optimum is
  reference F^(n - 1) / Z (`losses.best_of_n.variational_law`).

  Args:
    n: the best of how many; as many samples of the reference estimate F.

  Confidence: PAPER (form), MEMORY (n).
  """
  return bond(n=n, backward=1.0)
