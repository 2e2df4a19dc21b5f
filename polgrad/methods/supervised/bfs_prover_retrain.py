import dataclasses
from functools import partial
from typing import Annotated

from polgrad import collect, optim
from polgrad.methods.base import Method
from polgrad.methods.supervised.bfs_prover import bfs_prover
from polgrad.registry import AtLeastOne, Count, NotNegative, Range, part
from polgrad.sampling import behavior_policies


def bfs_prover_retrain(
  *,
  steps: int,
  strict: Annotated[float, Range(at_least=0, below=0.5)] = 0.2,
  plateau: Count = 10,
  expansions: AtLeastOne = 16,
  at_once: AtLeastOne = 4,
  alpha: NotNegative = 0.5,
) -> Method:
  """BFS-Prover-V2 with a retraining (arXiv:2509.06493): the best expert's answers teach a new policy.

  In the phase `expert`, `bfs_prover` improves the policy until it is on a plateau: the mean reward of
  the last `plateau` batches is no larger than that of as many before them. It takes half of the steps at
  most. Then the policy is initialised again, as it was before all phases, and learns from the best-first
  searches of the expert, which stays the same. Pairs of state and action are learned once, and the
  filter of turns is stricter: it keeps those between the quantiles `strict` and 1 - strict. So habits
  of early rounds are left behind.

  Differences: One retraining. Searches of one step are freed of repeated pairs, not all data of a round.
  Likelihoods are those under the new policy; the paper does not say whose.

  Args:
    steps: batches of the run; the run fills it in.
    strict: quantile of the stricter filter, below 1/2.
    plateau: batches whose rewards are compared; 0 retrains after half of the steps.
    expansions: states of a prompt that are expanded, at most.
    at_once: states of a prompt that are expanded together.
    alpha: exponent of the length of a path in the order of expansions.

  Confidence: PAPER (scheme). Trigger and quantiles are our choice.
  """
  half = max(steps // 2, 1)
  search = dict(expansions=expansions, at_once=at_once, alpha=alpha)
  expert = dict(steps=half, plateau=plateau)
  return dataclasses.replace(
    bfs_prover(low=strict, high=1 - strict),
    collect=partial(collect.BestFirst, behavior_policy=part(behavior_policies.teacher), **search),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    before={'expert': dataclasses.replace(bfs_prover(**search), **expert)},
    steps=steps - half,
  )
