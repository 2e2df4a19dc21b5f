"""Per-token statistics of the next-token distribution, without ever holding [B, T, V].

This is the only place where anything shifts: the hidden state at t - 1 scores `tokens[:, t]`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from polgrad import sharding
from polgrad.registry import call

Array = jax.Array

LOGITS = 2**26  # how many a device holds at a time: 256 MiB


def token_stats(
  hidden: Array,
  tokens: Array,
  unembed: Callable[[Array], Array],
  *,
  stats: Mapping[str, Callable],
  temperature: float | Array = 1.0,
  chunk: int | None = None,
  teacher_hidden: Array | None = None,
  teacher_unembed: Callable[[Array], Array] | None = None,
  where: Array | None = None,
  most: int = 0,
) -> dict[str, Array]:
  """Evaluates statistics of the next-token distribution in one pass over chunks of tokens.

  A statistic is a function of arrays that it takes by name: `logits` f32[n, V], `tokens` i32[n],
  `hidden` f32[n, D] (data: no gradient) and, with a teacher, `teacher_logits` f32[n, V]; it returns
  f32[n]. All statistics of a chunk read the same logits, which the backward pass computes again
  instead of keeping them.

  Args:
    hidden: [B, T, D], final hidden states.
    tokens: i32[B, T].
    unembed: hidden [..., D] -> f32[..., V]; gradients flow into the parameters it closes over.
    stats: functions by the name of their result.
    temperature: divides the logits, the teacher's too; the sampler's, so that log-probabilities
      are those of the policy that sampled.
    chunk: how many tokens of a device have their logits in memory at a time (at least one of each
      row, since rows stay where they are); None takes as many as have `LOGITS` logits.
    teacher_hidden: [B, T, D'], hidden states of a second model over the same tokens.
    teacher_unembed: hidden [..., D'] -> f32[..., V]. A teacher is data: no gradient reaches it.
    where: bool[B, T], tokens to evaluate; None is all. Column 0 has no past and is never one of them.
    most: at most so many of them are in a row.

  Returns:
    f32[B, T] by name. Entry [b, t] speaks about `tokens[b, t]`, and is 0 where nothing is evaluated.
  """

  def evaluate(tokens, hidden, *teacher):
    def logits(unembed, x):
      return unembed(x.reshape(-1, x.shape[-1])).astype(jnp.float32) / temperature

    arrays = {
      'logits': logits(unembed, hidden),
      'tokens': tokens.reshape(-1),
      'hidden': jax.lax.stop_gradient(hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)),
    }
    if teacher:
      arrays['teacher_logits'] = jax.lax.stop_gradient(logits(teacher_unembed, *teacher))
    return {name: call(stat, arrays).reshape(tokens.shape) for name, stat in stats.items()}

  inputs = [tokens[:, 1:], hidden[:, :-1]]
  if teacher_hidden is not None:
    inputs.append(teacher_hidden[:, :-1])
  if where is not None:
    columns = jnp.argsort(~where[:, 1:], axis=1, stable=True)[:, :most]
    inputs = [_take(x, columns) for x in inputs]
  rows, length = inputs[0].shape
  if chunk is None:
    chunk = LOGITS // jax.eval_shape(unembed, hidden[0, 0]).size
  at_once = max(1, chunk * sharding.ambient_data_parallel_size() // rows)
  if length <= at_once:
    out = evaluate(*inputs)
  else:
    pieces = [_split(x, at_once) for x in inputs]
    step = jax.checkpoint(evaluate, prevent_cse=False)
    _, out = jax.lax.scan(lambda carry, piece: (carry, step(*piece)), (), pieces)
    out = {name: _join(x)[:, :length] for name, x in out.items()}
  if where is not None:
    out = {name: _put(x, columns, where[:, 1:]) for name, x in out.items()}
  return {name: jnp.pad(x, ((0, 0), (1, 0))) for name, x in out.items()}


def _take(x: Array, columns: Array) -> Array:
  """Of every row of [B, T, ...] the columns i32[B, S]."""
  return jnp.take_along_axis(x, jnp.expand_dims(columns, range(2, x.ndim)), axis=1)


def _put(x: Array, columns: Array, where: Array) -> Array:
  """The inverse of `_take`, where it was asked for: [B, S] -> [B, T], with 0 elsewhere."""
  put = jax.vmap(lambda row, at, empty: empty.at[at].set(row))
  return jnp.where(where, put(x, columns, jnp.zeros(where.shape, x.dtype)), 0)


def _split(x: Array, columns: int) -> Array:
  """[B, T, ...] -> [pieces, B, columns, ...], the last piece filled up with zeros."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % columns)) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], -1, columns, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
  """[pieces, B, columns] -> [B, pieces * columns]."""
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
