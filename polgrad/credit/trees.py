"""Credit of steps and of trees: what further completions from inside a completion say of its parts."""

import functools

import jax.numpy as jnp

from polgrad.credit.base import Estimator, token_rewards
from polgrad.losses import trees
from polgrad.losses.advantages import NormalizerPart, identity
from polgrad.registry import call, inputs


def step_values(*, normalizer: NormalizerPart = identity) -> Estimator:
  """A = r_j + V(s_{j+1}) - V(s_j) for each token of step j: VinePPO (arXiv:2410.01679).

  V(s_j) is the mean reward of further completions from the state before step j. Needs a collector that
  draws them (`collect.Vines`).

  Args:
    normalizer: of the advantages.
  """

  def apply(batch, state):
    rewards = token_rewards(batch)
    found = trees.step_advantages(rewards, batch['step_values'], batch['step_ids'], batch.mask)
    return batch.with_arrays(advantages=normalizer(found, batch.mask)), state

  return Estimator(apply=apply, requires=frozenset({'step_values', 'step_ids'}))


def tree_values(
  *, weighting: trees.Weighting = 'advantage', normalizer: NormalizerPart = identity
) -> Estimator:
  """Global and local advantages of the nodes of a tree (TreeRL, arXiv:2506.11902), see
  `trees.tree_advantages`.

  Needs a collector that grows trees (`collect.Trees`). It has compared the rewards of all leaves, also
  of those that are not trained on, so the rewards of the rows are not read here.

  Args:
    weighting: how a token is weighed that is in the rows of several leaves.
    normalizer: of the advantages.
  """

  def apply(batch, state):
    found = call(functools.partial(trees.tree_advantages, weighting=weighting), batch)
    found = jnp.where(batch.mask, found, 0)
    return batch.with_arrays(advantages=normalizer(found, batch.mask)), state

  return Estimator(
    apply=apply,
    requires=frozenset(inputs(trees.tree_advantages)),
    scored=frozenset(),
  )
