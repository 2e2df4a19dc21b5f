from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, selections
from polgrad.methods.base import Method
from polgrad.registry import part


def bfs_prover(*, low: float = 0.1, high: float = 0.9) -> Method:
  """BFS-Prover-V2 (arXiv:2509.06493): expert iteration on steps that are neither mastered nor noise.

      loss = -token mean over kept turns of log pi

  A turn of a row with a reward above 1/2 is kept if its negative log-likelihood per token lies between
  the quantiles `low` and `high` of all such turns of the batch. In an environment a turn is one action
  of the policy, such as a tactic of a proof; without one it is the whole answer. low = 0 and high = 1
  are plain expert iteration. `bfs_prover_retrain` trains again from the first checkpoint.

  Differences: Rows are samples of the policy, while the paper searches for proofs best first, by the sum
  of log-likelihoods over length^alpha. Likelihoods are those at the time of the update, and quantiles
  are those of a batch, while the paper filters all proofs of a round at once. Its thresholds are not
  published.

  Args:
    low: the quantile below which turns are known already.
    high: the quantile above which turns are noise.

  Confidence: PAPER (scheme). The quantiles and the length normalisation are our choice.
  """
  return Method(
    collect=partial(collect.Rollouts),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      selections={'central': part(selections.central_turns, low=low, high=high)},
      only='central',
    ),
    learns='imitate',
  )
