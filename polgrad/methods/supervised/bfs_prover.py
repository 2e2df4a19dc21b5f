from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, selections
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, NotNegative, part


def bfs_prover(
  *,
  low: float = 0.1,
  high: float = 0.9,
  expansions: AtLeastOne = 16,
  at_once: AtLeastOne = 4,
  alpha: NotNegative = 0.5,
) -> Method:
  """BFS-Prover-V2 (arXiv:2509.06493): expert iteration on steps that are neither mastered nor noise.

      loss = -token mean over kept turns of log pi
      the open state with the largest sum_{t < L} log pi(a_t | s_t) / L^alpha is expanded next

  In an environment the samples of a prompt are a search: a turn is one action of the policy, such as a
  tactic of a proof, and states are expanded best first until an episode is rewarded. Each pair of state
  and action is learned once. Without an environment an action is the whole answer, and nothing is
  searched. A turn of a row with a reward above 1/2 is kept if its negative log-likelihood per token lies
  between the quantiles `low` and `high` of all such turns of the batch. low = 0 and high = 1 are plain
  expert iteration. `bfs_prover_retrain` trains again from the first checkpoint.

  Differences: A state is the whole conversation so far, while the paper's policy reads the goals that
  are left. Likelihoods are those at the time of the update, and quantiles are those of a batch, while
  the paper filters all proofs of a round at once. Its thresholds are not published.

  Args:
    low: the quantile below which turns are known already.
    high: the quantile above which turns are noise.
    expansions: states of a prompt that are expanded, at most; 1 draws single turns.
    at_once: states of a prompt that are expanded together.
    alpha: exponent of the length; 0 prefers short proofs.

  Confidence: PAPER (scheme, priority). The quantiles, the length normalisation and the default of alpha
  are our choice.
  """
  return Method(
    collect=partial(collect.BestFirst, expansions=expansions, at_once=at_once, alpha=alpha),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      selections={'central': part(selections.central_turns, low=low, high=high)},
      only='central',
    ),
    learns='imitate',
  )
