import dataclasses
from functools import partial
from typing import Annotated

from polgrad import collect, optim
from polgrad.methods.base import Method
from polgrad.methods.supervised.bfs_prover import bfs_prover
from polgrad.registry import Range, part
from polgrad.sampling import behavior_policies


def bfs_prover_retrain(
  *, steps: int, strict: Annotated[float, Range(at_least=0, below=0.5)] = 0.2
) -> Method:
  """BFS-Prover-V2 with a retraining (arXiv:2509.06493): the best expert's answers teach a new policy.

  In the first half of the steps, the phase `expert`, `bfs_prover` improves the policy. Then the policy
  is initialised again, as it was before all phases, and learns from samples of the expert, which stays
  as it was. The filter of turns is stricter: it keeps those between the quantiles `strict` and
  1 - strict. The paper does this when the expert no longer improves, to leave habits of early rounds
  behind.

  Differences: The time of the retraining is fixed. The expert does not search, and equal answers are not
  removed. Likelihoods are those under the new policy; the paper does not say whose.

  Args:
    steps: batches of the run; the run fills it in.
    strict: quantile of the stricter filter, below 1/2.

  Confidence: PAPER (scheme). Times and quantiles are our choice.
  """
  half = max(steps // 2, 1)
  return dataclasses.replace(
    bfs_prover(low=strict, high=1 - strict),
    collect=partial(collect.Rollouts, behavior_policy=part(behavior_policies.teacher)),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    before={'expert': dataclasses.replace(bfs_prover(), steps=half)},
    steps=steps - half,
  )
