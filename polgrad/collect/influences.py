"""How much the gradient of one reward also improves the others, for credit that weighs rewards by it.

An estimator of credit with `contrasts` makes K different advantages of a batch. Before it assigns
credit, the gradient g_k of the policy's loss under each of them is taken, at the parameters that
collected the batch. The estimator reads the feature `influences`, I_k = sum_j g_k . g_j
(arXiv:2509.11452).
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad import sharding
from polgrad.collect.base import Context
from polgrad.compiling import jit
from polgrad.digests import path_name
from polgrad.learner import Learner
from polgrad.models.policy import Policy, learned
from polgrad.packing import pack
from polgrad.types import Array, Batch, Params, TrainState

TERM = 'policy'  # the term of `objectives.PolicyGradient` whose gradients are compared
MADE = 'contrasts'  # feature that carries the advantages to the devices, [B, T, K]


def chosen(policy: Policy, pattern: str) -> list[str]:
  """The names of the trained parameters that a regular expression finds; '' finds all."""
  paths = jax.tree_util.tree_leaves_with_path(learned(policy, policy.shapes()))
  return [path_name(path) for path, _ in paths if re.search(pattern, path_name(path))]


def influences_of(gradients: list[Params], names: list[str]) -> Array:
  """I_k = sum_j g_k . g_j over the named arrays of K gradients, f32[K]."""

  def parts(tree):
    found = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return [found[name].astype(jnp.float32) for name in names]

  taken = [parts(tree) for tree in gradients]
  total = [sum(arrays) for arrays in zip(*taken)]
  dot = lambda a, b: sum(jnp.sum(x * y) for x, y in zip(a, b))
  return jnp.stack([dot(one, total) for one in taken])


Measure = Callable[[TrainState, Batch], Batch]


def make_influences(context: Context, temperature: float) -> Measure | None:
  """Compiles the gradients that the context's credit asks for; None if it asks for none.

  Args:
    temperature: divides all logits, as it did when the rows were sampled.

  Returns:
    (state, annotated batch (NumPy)) -> the batch with the feature `influences` f32[B, K], of which every
    row holds the same numbers.
  """
  contrasts = context.credit.contrasts
  if contrasts is None:
    return None
  pieces = context.micro_batches * context.minibatches  # the batch is that of a whole step
  learner = Learner(
    context.policy,
    context.objective,
    optax.identity(),
    temperature=temperature,
    micro_batches=pieces,
    frozen=context.frozen,
  )
  names = chosen(context.policy, contrasts.parameters)
  make = jit(contrasts.make)

  def compute(state: TrainState, batch: Batch) -> Array:
    rest = {name: x for name, x in batch.features.items() if name != MADE}
    trainable, made = learned(context.policy, state.params), batch[MADE]
    gradient = lambda advantages: learner.gradient(
      state, trainable, batch.replace(advantages=advantages, features=rest), TERM
    )[1]
    return influences_of([gradient(made[..., k]) for k in range(made.shape[-1])], names)

  compiled = jit(compute)

  def measure(state: TrainState, batch: Batch) -> Batch:
    mask = batch.mask & batch.valid[:, None]
    rows = batch.replace(mask=mask, layout=context.layout)
    made = np.asarray(make(rows))
    rows = rows.with_arrays(**{MADE: np.moveaxis(np.where(mask, made, 0.0), 0, -1)})
    rows = pack(
      rows,
      parts=pieces,
      rows_per_prompt=learner.rows_per_prompt(rows),
      data_parallel_size=sharding.data_parallel_size(context.mesh),
    )
    found = compiled(state.replace(responses=()), sharding.place_batch(context.mesh, rows))
    every = np.tile(sharding.to_host(found), (len(batch.tokens), 1))
    return batch.with_arrays(influences=every.astype(np.float32))

  return measure
