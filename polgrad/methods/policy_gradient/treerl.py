from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, surrogates, trees
from polgrad.methods.base import Method
from polgrad.registry import part


def treerl(
  *,
  trained: int = 16,
  grown: int = 6,
  iterations: int = 1,
  forks: int = 2,
  branches: int = 2,
  weighting: trees.Weighting = 'advantage',
  eps: float = 0.2,
) -> Method:
  """TreeRL (arXiv:2506.11902): completions that branch at uncertain tokens, credit by the tree.

      loss = -mean over sequences of token means of min(r A, clip(r, 1 - eps, 1 + eps) A)
      A = ((V(n) - V(root)) + (V(n) - V(parent of n))) / sqrt(trained leaves below n)

  r = pi / pi_old. The value of a leaf is its reward minus the mean reward of the other leaves of its
  prompt, and V(n) is the mean over the leaves below the node n of a token; V(root) = 0. There is no KL.
  A prompt has `grown` completions; `iterations` times, the `forks` least likely tokens of each are
  drawn again `branches` times: 30 leaves. They are compared with each other, and `trained` of them,
  drawn at random, are trained on, among them one of the best.

  Differences: The temperature (1.2 in the paper) and top-p (.95) are those of the task. Both weightings
  count the leaves that are trained on, as the code does. The code gives a node with the value of its
  parent the local advantage of the node before it; here it is 0. Forks may lie anywhere in a completion.

  Args:
    trained: leaves of a prompt that are trained on.
    grown: trees of a prompt.
    iterations: how often the trees are forked.
    forks: tokens of a tree that are forked in an iteration.
    branches: new leaves of a fork.
    weighting: 'advantage' is the paper's division by the root of the number of leaves, 'value' that of
      the authors' code, which divides the values before they are subtracted; 'none' divides nothing.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (credit and sampling); MEMORY (the paper's weighting, and the surrogate).
  """
  return Method(
    collect=partial(
      collect.Trees,
      samples_per_prompt=trained,
      trees=grown,
      iterations=iterations,
      forks=forks,
      branches=branches,
    ),
    credit=part(credit.tree_values, weighting=weighting),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
    ),
  )
