"""A model of prompts in context: how likely is success, given results of the same policy on others?

The parameters do not know the policy. What it can do is read from a context of pairs (embedding of a
prompt, reward), so the prediction follows the policy without an update of the parameters (V_0,
arXiv:2602.03584). All functions are pure; the memory of pairs is a ring in which the oldest is
overwritten.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad.losses.auxiliary_rewards import context_loss
from polgrad.types import Array, Params

HEADS = 4  # kernels by which prompts are compared


class Memory(NamedTuple):
  """The last M pairs."""

  embeddings: Array  # f32[M, E]
  rewards: Array  # f32[M]
  rows: Array  # i32[M], row of the prompt in the data
  count: Array  # i32[], pairs that were ever stored; the newest is at (count - 1) mod M


def empty(size: int, width: int) -> Memory:
  """A memory for `size` pairs with embeddings of `width` numbers."""
  return Memory(
    np.zeros((size, width), np.float32),
    np.zeros(size, np.float32),
    np.full(size, -1, np.int32),
    np.zeros((), np.int32),
  )


def stored(memory: Memory, embeddings: Array, rewards: Array, rows: Array, valid: Array) -> Memory:
  """The memory with the valid pairs of a step; of too many, some are left out.

  In which order they come depends on their rows and rewards alone, not on their order in the batch.
  """
  size = len(memory.rewards)
  # A fixed shuffle of the rows, so that what is left out is no part of the data.
  shuffled = rows.astype(jnp.uint32) * jnp.uint32(2654435761)
  order = jnp.lexsort((rewards, shuffled, ~valid))
  number, place = jnp.sum(valid, dtype=jnp.int32), jnp.arange(len(rows))
  kept = (place < number) & (place >= number - size)
  slots = jnp.where(kept, (memory.count + place) % size, size)
  put = lambda old, new: jnp.asarray(old).at[slots].set(new[order], mode='drop')
  return Memory(
    put(memory.embeddings, embeddings),
    put(memory.rewards, rewards),
    put(memory.rows, rows),
    memory.count + number,
  )


def newest(memory: Memory, number: int) -> tuple[Array, Array, Array]:
  """(embeddings, rewards, valid) of the newest `number` pairs, the newest first."""
  size = len(memory.rewards)
  place = (memory.count - 1 - jnp.arange(min(number, size))) % size
  valid = jnp.arange(len(place)) < memory.count
  return memory.embeddings[place], memory.rewards[place], valid


def init(key: Array, width: int, features: int) -> Params:
  """Parameters for embeddings of `width` numbers, with `features` for each of the kernels.

  Before any update the prediction is a mean of the rewards of similar prompts.
  """
  projection = jax.random.normal(key, (width, HEADS, features)) / np.sqrt(features)
  return {
    'compare': projection,
    'sharpness': jnp.linspace(0.0, 2.0, HEADS),  # logarithms
    'bias': jnp.zeros((width,)),
    'trust': jnp.full((HEADS,), 1.0),
    'base': jnp.ones(()),
    'offset': jnp.zeros(()),
  }


def score(params: Params, query: Array, embeddings: Array, rewards: Array, seen: Array) -> Array:
  """The logit of the success of each query, given a context.

      a_h = softmax over the context of exp(sharpness_h) <W_h x, W_h x_i>
      logit = base log((s + 1/2) / (n - s + 1/2)) + sum_h trust_h m_h + <bias, x> + offset
      m_h = sum_i a_hi (R_i - s / n)

  n is the number of pairs in the context and s the sum of their rewards, so the first term alone is the
  success rate of the policy. Without a context it is 0, and so is m_h.

  Args:
    query: [Q, E], embeddings x.
    embeddings: [C, E], of the context.
    rewards: [C], in [0, 1].
    seen: bool[Q, C], which pairs are in the context of which query.

  Returns:
    [Q].
  """
  chex.assert_rank([query, embeddings, rewards, seen], [2, 2, 1, 2])
  chex.assert_shape(seen, (len(query), len(embeddings)))
  compare = lambda x: jnp.einsum('ne,ehf->nhf', x, params['compare'])
  alike = jnp.einsum('qhf,chf->qhc', compare(query), compare(embeddings))
  alike *= jnp.exp(params['sharpness'])[None, :, None]
  weights = jax.nn.softmax(jnp.where(seen[:, None], alike, -1e30), axis=-1)
  number = jnp.sum(seen, axis=-1).astype(query.dtype)
  total = jnp.sum(jnp.where(seen, rewards, 0), axis=-1)
  rate = total / jnp.maximum(number, 1)
  weights = jnp.where(seen[:, None], weights, 0)
  found = jnp.einsum('qhc,qc->qh', weights, rewards[None] - rate[:, None])
  base = jnp.log((total + 0.5) / (number - total + 0.5))
  return params['base'] * base + found @ params['trust'] + query @ params['bias'] + params['offset']


class Learned(NamedTuple):
  """The model with its memory: the state of a curriculum."""

  params: Params
  opt_state: Any
  memory: Memory
  # f32[], of the last step before its updates: the loss, and the fraction of pairs of a right and a
  # wrong completion that are in the right order
  loss: Array
  ranking: Array


def begin(
  optimizer: optax.GradientTransformation, width: int, *, features: int, memory: int
) -> Learned:
  """The state before anything was observed."""
  params = init(jax.random.key(0), width, features)
  zero = np.zeros((), np.float32)
  return Learned(params, optimizer.init(params), empty(memory, width), zero, zero + 0.5)


def predicted(state: Learned, query: Array, *, context: int) -> Array:
  """The success rate of each query [Q], given the newest `context` pairs; its own are not left out."""
  return jax.nn.sigmoid(_scores(state, query, context))


def _scores(state: Learned, query: Array, context: int) -> Array:
  embeddings, rewards, valid = newest(state.memory, context)
  seen = jnp.broadcast_to(valid, (len(query), len(valid)))
  return score(state.params, query, embeddings, rewards, seen)


def learned(
  state: Learned,
  step: Mapping[str, Array],
  optimizer: optax.GradientTransformation,
  *,
  context: int,
  updates: int,
  rank: float,
) -> Learned:
  """The state after a step: it is judged on the new pairs, stores them and learns from the memory.

  An update takes 2 `context` random pairs of the memory. It predicts those of half of the prompts from
  those of the other half. A step without valid pairs changes nothing.

  Args:
    step: `embeddings` f[n, E], `rewards` f[n], `rows` i[n] and `valid` bool[n].
    context: pairs of a context.
    updates: gradient steps.
    rank: of `context_loss`.
  """
  rewards = jnp.clip(jnp.where(step['valid'], step['rewards'], 0), 0, 1)
  rows = jnp.asarray(step['rows'])
  memory = stored(state.memory, step['embeddings'], rewards, rows, step['valid'])
  loss, ranking = _judged(state, step, rewards, context=context, rank=rank)

  def update(carry, number):
    params, opt_state = carry
    key = jax.random.fold_in(jax.random.key(memory.count), number)
    gradient = jax.grad(_memory_loss)(params, memory, key, context=context, rank=rank)
    changes, opt_state = optimizer.update(gradient, opt_state, params)
    return (optax.apply_updates(params, changes), opt_state), None

  (params, opt_state), _ = jax.lax.scan(
    update, (state.params, state.opt_state), jnp.arange(updates)
  )
  after = Learned(params, opt_state, memory, loss, ranking)
  return jax.tree.map(functools.partial(jnp.where, jnp.any(step['valid'])), after, state)


def _judged(state, step, rewards, *, context, rank) -> tuple[Array, Array]:
  """Loss and ranking of the new pairs, predicted from those before."""
  scores = _scores(state, step['embeddings'], context)
  one = jnp.zeros(len(scores), jnp.int32)
  loss = context_loss(scores, rewards, one, step['valid'], rank=rank)
  right = (rewards > 0.5) & step['valid']
  pairs = right[:, None] & (step['valid'] & ~right)[None]
  higher = jnp.sign(scores[:, None] - scores[None]) / 2 + 0.5
  ranking = jnp.sum(jnp.where(pairs, higher, 0)) / jnp.maximum(jnp.sum(pairs), 1)
  return loss, jnp.where(jnp.any(pairs), ranking, 0.5)


def _memory_loss(params, memory: Memory, key: Array, *, context: int, rank: float) -> Array:
  """The loss of random pairs, predicted from pairs of other prompts.

  Prompts, not pairs, are divided. Else the success rate of the context would differ between queries by
  their own results alone, and tell these.
  """
  size = len(memory.rewards)
  there = jnp.arange(size) < memory.count
  noise = jax.random.uniform(key, (size,))
  pick = jnp.argsort(jnp.where(there, noise, 2.0))[: 2 * context]
  rows, there = memory.rows[pick], there[pick]
  side = jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row)))(rows)
  embeddings, rewards = memory.embeddings[pick], memory.rewards[pick]
  seen = jnp.broadcast_to(there & side, (len(pick), len(pick)))
  scores = score(params, embeddings, embeddings, rewards, seen)
  return context_loss(scores, rewards, jnp.zeros_like(rows), there & ~side, rank=rank)
