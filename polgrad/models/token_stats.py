"""Statistics of the next-token distribution for every token, without storing logits [B, T, V].

Logits are shifted here: the hidden state at t - 1 predicts `tokens[:, t]`, and the results are stored at
t. The only other shift in polgrad is that of values, in `learner.py`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import subjaxprs
from jax.sharding import PartitionSpec

from polgrad import sharding
from polgrad.arrays import WIDE
from polgrad.models.policy import Policy
from polgrad.registry import call, inputs

Array = jax.Array

CONTEXT = frozenset({'context', 'context_mask'})  # what `earlier` makes, if a statistic reads it
LOGITS = 2**26  # logits that a device stores at a time by default: 256 MiB in float32


def reads_context(stats: Mapping[str, Callable]) -> bool:
  """Whether a statistic reads the tokens before its own."""
  return any(CONTEXT & set(inputs(stat)) for stat in stats.values())


class Unembedding(NamedTuple):
  """A model's `unembed` with the parameters that it reads; [..., D] -> f32[..., V] when it is called.

  On a mesh `token_stats` then gathers these parameters once, and not for every chunk.
  """

  function: Callable[[Any, Array], Array]  # parameters, hidden -> logits
  weights: Any
  axes: Callable[[Any], Any]  # weights -> their logical axes

  def __call__(self, hidden: Array) -> Array:
    return self.function(self.weights, hidden)


def unembedding(policy: Policy, params: Any) -> Unembedding:
  """The `unembed` of a policy with its parameters."""
  return Unembedding(policy.unembed, policy.readout(params), policy.axes)


class Rows(NamedTuple):
  """Whole rows, of which statistics read the tokens before their own."""

  tokens: Array  # i32[B, T]
  segment_ids: Array  # i32[B, T], 0 is padding
  mask: Array  # bool[B, T]


def earlier(rows: Rows, columns: Array) -> dict[str, Array]:
  """The tokens before some tokens, in the documents of these.

  Args:
    columns: i32[B, S], places of the tokens in the rows.

  Returns:
    `context` i32[B, S, T]: every token of the same document in an earlier column, in its own column,
    and -1 in all others. `context_mask` bool[B, S, T]: which of them are in the mask.
  """
  take = lambda x: jnp.take_along_axis(x, columns, axis=1)[:, :, None]
  before = jnp.arange(rows.tokens.shape[1])[None, None] < columns[:, :, None]
  before &= (rows.segment_ids[:, None] == take(rows.segment_ids)) & (take(rows.segment_ids) > 0)
  context = jnp.where(before, rows.tokens[:, None], -1)
  return {'context': context, 'context_mask': before & rows.mask[:, None]}


def whole_context(tokens: Array, segment_ids: Array, mask: Array) -> dict[str, Array]:
  """`earlier` of all tokens: `context` i32[B, T, T] and `context_mask` bool[B, T, T]."""
  columns = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  return earlier(Rows(jnp.asarray(tokens), jnp.asarray(segment_ids), jnp.asarray(mask)), columns)


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
  whole: Rows | None = None,
  wide: Mapping[str, Array] = {},
  where: Array | None = None,
  most: int = 0,
) -> dict[str, Array]:
  """Evaluates statistics of the next-token distribution in one pass over chunks of tokens.

  A statistic is a function that returns f32[n] or f32[n, m] for n tokens. The names of its arguments say
  which arrays it reads: `logits` f32[n, V], `tokens` i32[n], `hidden` f32[n, D] (without gradient), with
  a teacher `teacher_logits` f32[n, V], with whole rows `context` i32[n, T] and `context_mask`
  bool[n, T], see `earlier`, and those of `wide`. The logits of a chunk are computed once for all
  statistics. The backward pass computes them again instead of keeping them. Where the two models have
  embeddings of different sizes, because one has more rows of padding, a statistic that reads
  `teacher_logits` gets logits of the ids that both have.

  Args:
    hidden: [B, T, D], final hidden states.
    tokens: i32[B, T].
    unembed: hidden [..., D] -> f32[..., V]; gradients flow into the parameters it closes over, or has as
      an `Unembedding`.
    stats: functions by the name of their result.
    temperature: divides the logits, also those of the teacher. With the sampler's temperature,
      log-probabilities are those of the policy that sampled.
    chunk: number of tokens on each device whose logits are in memory at a time; None: as many as have
      `LOGITS` logits. A chunk takes the same columns of all rows, so it has at least one token of each
      row. Where devices share the vocabulary, see `_by_vocabulary`, this is the number of tokens of all
      of them.
    teacher_hidden: [B, T, D'], hidden states of a second model over the same tokens.
    teacher_unembed: hidden [..., D'] -> f32[..., V]. No gradient reaches the teacher.
    whole: the rows that `tokens` are the last columns of; NaN outside their mask reaches no gradient.
      None: all tokens are in the mask, and no statistic reads earlier ones.
    wide: further arrays [B, T, k] of the tokens, by name, of which statistics read [n, k].
    where: bool[B, T], tokens to evaluate; None: all. Column 0 has no past and is never evaluated.
    most: with `where`, an upper bound of the number of evaluated tokens in a row.

  Returns:
    f32[B, T] or f32[B, T, m] by name. Entry [b, t] is the statistic of `tokens[b, t]`, 0 where nothing
    is evaluated.
  """
  # The shift: the hidden state of a column predicts the token of the next column.
  of_tokens = {'tokens': tokens[:, 1:], 'hidden': hidden[:, :-1]}
  of_tokens |= {name: x[:, 1:] for name, x in wide.items()}
  if teacher_hidden is not None:
    of_tokens['teacher_hidden'] = teacher_hidden[:, :-1]
  if whole is not None:
    seen = whole.mask[:, whole.mask.shape[1] - tokens.shape[1] :][:, 1:]
    of_tokens = {name: _inside(x, seen) for name, x in of_tokens.items()}
  if reads_context(stats):
    start = whole.tokens.shape[1] - tokens.shape[1]
    columns = jnp.arange(start, whole.tokens.shape[1], dtype=jnp.int32)
    of_tokens['columns'] = jnp.broadcast_to(columns[None], tokens.shape)[:, 1:]
  # Where the positions of a row are sharded, so are these columns, with one more if they do not divide.
  length = tokens.shape[1] - 1
  pieces = max(map(sharding.pieces_of_a_row, (length, length + 1)))
  if pieces > 1:
    of_tokens = {name: _filled(x, pieces) for name, x in of_tokens.items()}
    for name in of_tokens.keys() & {'hidden', 'teacher_hidden'}:
      of_tokens[name] = sharding.constrain(of_tokens[name], ('batch', 'length', 'hidden'))
  # The evaluated tokens of a row are in any of its pieces, so pieces are computed whole.
  gathers = where is not None and pieces == 1
  if gathers:
    # Gather the evaluated tokens of each row to its left, so that only `most` columns are computed.
    chosen = jnp.argsort(~where[:, 1:], axis=1, stable=True)[:, :most]
    of_tokens = {name: _take(x, chosen) for name, x in of_tokens.items()}
  rows, width = of_tokens['tokens'].shape
  if chunk is None:
    chunk = LOGITS // jax.eval_shape(unembed, hidden[0, 0]).size
  models = {'unembed': unembed, 'teacher_unembed': teacher_unembed}
  models = {name: model for name, model in models.items() if model is not None}
  run = _way(models, stats, rows, width, chunk, pieces)
  out = run(of_tokens, whole, temperature, models, stats=stats)
  # Back to columns of `tokens`: undo the gathering and the shift.
  if gathers:
    out = {name: _put(x, chosen, where[:, 1:]) for name, x in out.items()}
  else:
    out = {name: x[:, :length] for name, x in out.items()}
  if where is not None and not gathers:
    seen = lambda x: jnp.expand_dims(where[:, 1:], range(2, x.ndim))
    out = {name: jnp.where(seen(x), x, 0) for name, x in out.items()}
  first = lambda x: jnp.pad(x, ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))
  return {name: first(x) for name, x in out.items()}


def _way(
  models: Mapping[str, Callable],
  stats: Mapping[str, Callable],
  rows: int,
  width: int,
  chunk: int,
  pieces: int,
) -> Callable:
  """The one of `_in_chunks`, `_on_own_tokens` and `_by_vocabulary` to use, with its columns of a chunk.

  Args:
    rows, width: of the tokens that are evaluated, on all devices.
    chunk: see `token_stats`.
    pieces: number of pieces into which devices cut the positions of a row.
  """
  devices = sharding.ambient_data_parallel_size()
  # Number of columns of a piece in a chunk: every device holds its part of the rows.
  at_once = _even(width // pieces, max(1, chunk * devices // rows))
  if width <= at_once * pieces or not _can_gather(models, rows, pieces):
    return functools.partial(_in_chunks, columns=at_once * pieces)
  near = _near(models, stats, rows * width // devices)
  if near == 1:
    return functools.partial(_on_own_tokens, columns=at_once)
  # A product has tokens of `near` devices, so fewer of each.
  return functools.partial(_by_vocabulary, near=near, columns=_even(width, max(1, at_once // near)))


def _even(width: int, at_once: int) -> int:
  """The least number of columns in a chunk for as many chunks, so that the last one is hardly filled up.

  >>> _even(4095, 441)
  410
  """
  return -(-width // -(-width // at_once))


def _can_gather(models: Mapping[str, Callable], rows: int, pieces: int) -> bool:
  """Whether there is a mesh whose devices can evaluate their own tokens, see `_on_own_tokens`."""
  size = sharding.ambient_data_parallel_size()
  known = all(isinstance(model, Unembedding) for model in models.values())
  return known and size * pieces > 1 and rows % size == 0


# The hidden states that each model reads. Its weights are exchanged in their type.
STATES = {'unembed': 'hidden', 'teacher_unembed': 'teacher_hidden'}

# Devices with pieces of the vocabulary can compute a statistic that reads these arrays alone, ...
BY_VOCABULARY = frozenset({'logits', 'tokens', 'teacher_logits'})
# ... and has none of these operations, which need all entries of the vocabulary in order.
IN_ORDER = frozenset({'sort', 'top_k', 'approx_top_k'})
IN_ORDER |= {'cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp'}


def _near(models: Mapping[str, Callable], stats: Mapping[str, Callable], tokens: int) -> int:
  """The number of devices that share the vocabulary, see `_by_vocabulary`; 1: each needs all of it.

  It is the number with which the fewest bytes move, and 1 where the mesh, a model or a statistic allows
  no other.

  Args:
    tokens: those that each device evaluates.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
  rows = [axis for axis in sharding.row_axes(mesh) if axis in sizes]
  if mesh.manual_axes or [*sizes] != rows or rows not in (['fsdp'], ['data', 'fsdp']):
    return 1
  tables = set()  # sizes of vocabularies of tables whose width alone is cut; 0 of other parameters

  def look(x: Array, axes: tuple[str, ...]) -> None:
    cut = axes == ('vocab', 'embed')
    cut = cut and sharding.cut_along(mesh, rows, axes, x.shape) == PartitionSpec(None, ('fsdp',))
    tables.add(x.shape[0] if cut else 0)

  for model in models.values():
    jax.tree.map(look, model.weights, model.axes(model.weights))
  size = max(tables, default=0)
  if tables != {size} or not size:
    return 1
  if not all(_goes_by_vocabulary(stat, size) for stat in stats.values()):
    return 1
  n = sizes['fsdp']
  return min(sharing(size, n), key=lambda near: exchanged(size, tokens, n, near))


def sharing(vocab: int, devices: int) -> list[int]:
  """The numbers of devices that can share a vocabulary: they divide its size and that of the mesh axis.

  >>> sharing(48, 32)
  [1, 2, 4, 8, 16]
  """
  return [n for n in range(1, devices + 1) if devices % n == 0 and vocab % n == 0]


def exchanged(vocab: int, tokens: float, devices: int, near: int, *, update: bool = True) -> float:
  """Vectors of the model's width that a device receives for the statistics of its tokens.

  >>> exchanged(8, 2, 4, 1), exchanged(8, 2, 4, 2)
  (12.0, 12.0)
  >>> exchanged(8, 2, 4, 1, update=False), exchanged(8, 2, 4, 4, update=False)
  (6.0, 7.5)

  Args:
    vocab: entries of the vocabulary.
    tokens: those that each device evaluates.
    devices: those over which the width of the unembedding is cut.
    near: number of devices that share the vocabulary, see `_by_vocabulary`.
    update: with the backward pass.
  """
  # The unembedding and its gradient; hidden states in both passes, and their gradient.
  table = vocab / devices * (near - 1) / near + vocab / near * (1 - near / devices)
  states = tokens * (near - 1)
  return 2 * table + 3 * states if update else table + states


def _goes_by_vocabulary(stat: Callable, size: int) -> bool:
  """Whether devices with pieces of the vocabulary compute a statistic without exchanging logits."""
  names = inputs(stat)
  if not {*names} <= BY_VOCABULARY:
    return False
  shapes = {name: jax.ShapeDtypeStruct((2, size), jnp.float32) for name in names}
  if 'tokens' in names:
    shapes['tokens'] = jax.ShapeDtypeStruct((2,), jnp.int32)
  traced = jax.make_jaxpr(lambda arrays: call(stat, arrays))(shapes)
  return not IN_ORDER & _primitives(traced.jaxpr)


def _primitives(jaxpr: Any) -> set[str]:
  """The names of the operations of a traced function, with those of functions that it calls."""
  found = {equation.primitive.name for equation in jaxpr.eqns}
  return found.union(*map(_primitives, subjaxprs(jaxpr)))


def _by_vocabulary(
  of_tokens: Mapping[str, Array],
  whole: Rows | None,
  temperature: float | Array,
  models: Mapping[str, Unembedding],
  *,
  stats: Mapping[str, Callable],
  columns: int,
  near: int,
) -> dict[str, Array]:
  """`_in_chunks` on a mesh, where groups of `near` devices share the vocabulary.

  Each device gathers the rows of the unembedding for its piece of the vocabulary, once. For each chunk
  it gathers the hidden states of the tokens of its group, and computes a piece of their logits. So it
  holds only this piece of the unembedding and of its gradient, and the gradients of all chunks are added
  up before they are exchanged. The compiler divides the statistics, and adds up their sums over devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rows, fsdp = ('data', 'fsdp'), mesh.shape['fsdp']
  close, far = sharding.Group(near), sharding.Group(fsdp // near, stride=near)
  on_each = functools.partial(jax.shard_map, axis_names={*rows}, check_vma=False)

  def piece(x: Array, dtype: Any) -> Array:
    # [V, D / fsdp] -> [V / near, D near / fsdp] within a group -> [1, V / near, D] between groups
    exchange = dict(tiled=True, axis_index_groups=close.members(fsdp))
    x = jax.lax.all_to_all(x.astype(dtype), 'fsdp', split_axis=0, concat_axis=1, **exchange)
    return sharding.gather(x, ('fsdp',), 1, far)[None]

  def cut(name: str, model: Unembedding) -> Callable[[Array], Array]:
    held = functools.partial(piece, dtype=of_tokens[STATES[name]].dtype)
    gather = on_each(held, in_specs=PartitionSpec(None, 'fsdp'), out_specs=PartitionSpec(rows))
    weights = jax.tree.map(gather, sharding.added_up_wide(model.weights))

    def product(weights, hidden: Array) -> Array:
      hidden = sharding.gather(hidden, ('fsdp',), 0, close).astype(hidden.dtype)
      return model.function(jax.tree.map(lambda x: x[0], weights), hidden)[None]

    def logits(hidden: Array) -> Array:
      own = PartitionSpec(rows)
      x = on_each(product, in_specs=(own, own), out_specs=own)(weights, hidden)
      # A group of devices has pieces [near, tokens, V / near] of the logits of its tokens.
      x = x.reshape(-1, near, *x.shape[1:]).swapaxes(1, 2)
      return sharding.constrain_near(x.reshape(len(hidden), -1), near, last=True)

    return logits

  pieces = {name: cut(name, model) for name, model in models.items()}
  of_tokens = {**of_tokens, 'tokens': sharding.constrain_near(of_tokens['tokens'], near)}
  out = _in_chunks(of_tokens, whole, temperature, pieces, stats=stats, columns=columns)
  own_rows = functools.partial(jax.lax.with_sharding_constraint, shardings=PartitionSpec(rows))
  return {name: own_rows(x) for name, x in out.items()}


def _on_own_tokens(
  of_tokens: Mapping[str, Array],
  whole: Rows | None,
  temperature: float | Array,
  models: Mapping[str, Unembedding],
  *,
  stats: Mapping[str, Callable],
  columns: int,
) -> dict[str, Array]:
  """`_in_chunks` on every device of a mesh for its own rows, and its own positions of them.

  Weights that are cut over the devices are gathered before the first chunk, and the gradients of all
  chunks are added up before they are scattered. The compiler would do both once for every chunk.
  """
  mesh = jax.sharding.get_abstract_mesh()
  width = of_tokens['tokens'].shape[1]
  rows = sharding.row_axes(mesh)
  positions = sharding.mesh_axes(sharding.partition_spec(mesh, ('length',), (width,))[0])
  cut = lambda axes, x: sharding.cut_along(mesh, rows + positions, axes, x.shape)
  specs = {
    name: jax.tree.map(lambda x, axes: cut(axes, x), model.weights, model.axes(model.weights))
    for name, model in models.items()
  }

  def gather(x: Array, spec: PartitionSpec, dtype: Any) -> Array:
    # The gradients of chunks are added in float32; inside the loop no copy in this type remains.
    x = x.astype(dtype)
    for dimension, names in enumerate(spec):
      x = sharding.gather(x, names, dimension) if names else x
    return x.astype(jnp.float32)

  def local(weights, temperature, of_tokens, whole):
    gathered = {}
    for name, model in models.items():
      held = functools.partial(gather, dtype=of_tokens[STATES[name]].dtype)
      gathered[name] = model._replace(weights=jax.tree.map(held, weights[name], specs[name]))
    return _in_chunks(of_tokens, whole, temperature, gathered, stats=stats, columns=columns)

  own, every = PartitionSpec(rows, positions), PartitionSpec()
  run = jax.shard_map(
    local,
    in_specs=(specs, every, own, PartitionSpec(rows)),
    out_specs=own,
    axis_names={*rows, *positions},
    check_vma=False,
  )
  weights = {name: sharding.added_up_wide(model.weights) for name, model in models.items()}
  return run(weights, jnp.asarray(temperature, jnp.float32), of_tokens, whole)


def _in_chunks(
  of_tokens: Mapping[str, Array],
  whole: Rows | None,
  temperature: float | Array,
  models: Mapping[str, Callable],
  *,
  stats: Mapping[str, Callable],
  columns: int,
) -> dict[str, Array]:
  """`_evaluate` of a number of columns at a time: arrays [B, T, ...] -> f32[B, T, ...] by name."""
  evaluate = functools.partial(
    _evaluate, whole=whole, temperature=temperature, models=models, stats=stats
  )
  width = of_tokens['tokens'].shape[1]
  if width <= columns:
    return evaluate(of_tokens)
  # Checkpointed: the backward pass computes the logits of one chunk at a time again.
  chunks = {name: _split(x, columns) for name, x in of_tokens.items()}
  step = jax.checkpoint(evaluate, prevent_cse=False)
  _, out = jax.lax.scan(lambda carry, chunk: (carry, step(chunk)), (), chunks)
  return {name: _join(x, width) for name, x in out.items()}


def _evaluate(
  of_tokens: Mapping[str, Array],
  *,
  whole: Rows | None,
  temperature: float | Array,
  models: Mapping[str, Callable],
  stats: Mapping[str, Callable],
) -> dict[str, Array]:
  """All statistics of one chunk: arrays [B, S, ...] of its tokens -> f32[B, S, ...] by name."""
  flat = {name: sharding.merge_positions(x) for name, x in of_tokens.items()}

  def logits(unembed, x):
    return unembed(x).astype(jnp.float32) / temperature

  arrays = {
    'logits': logits(models['unembed'], flat['hidden']),
    'tokens': flat['tokens'],
    'hidden': jax.lax.stop_gradient(flat['hidden'].astype(jnp.float32)),
  }
  arrays = {**{name: flat[name] for name in WIDE & flat.keys()}, **arrays}
  if 'teacher_hidden' in flat:
    teacher = logits(models['teacher_unembed'], flat['teacher_hidden'])
    arrays['teacher_logits'] = jax.lax.stop_gradient(teacher)
  if 'columns' in flat:
    found = earlier(whole, of_tokens['columns'])
    arrays |= {name: sharding.merge_positions(x) for name, x in found.items()}
  both = arrays
  if 'teacher_logits' in arrays:
    names = ('logits', 'teacher_logits')
    size = min(arrays[name].shape[-1] for name in names)
    both = arrays | {name: arrays[name][:, :size] for name in names}
  of = lambda stat: both if 'teacher_logits' in inputs(stat) else arrays
  shape = of_tokens['tokens'].shape
  found = {name: call(stat, of(stat)) for name, stat in stats.items()}
  return {name: sharding.split_positions(x, *shape) for name, x in found.items()}


def _inside(x: Array, seen: Array) -> Array:
  """x [B, S, ...] with 0 where `seen` bool[B, S] is False, if it holds real numbers.

  The gradient of a token outside the mask is 0 times a derivative, which is NaN where the derivative is.
  Therefore NaN and infinity are replaced before logits are computed of them, not in the result.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  return jnp.where(jnp.expand_dims(seen, range(2, x.ndim)), x, 0)


def _take(x: Array, columns: Array) -> Array:
  """Selects the columns i32[B, S] of every row of x [B, T, ...]; the result is [B, S, ...]."""
  return jnp.take_along_axis(x, jnp.expand_dims(columns, range(2, x.ndim)), axis=1)


def _put(x: Array, columns: Array, where: Array) -> Array:
  """Puts what `_take` selected back into its columns: [B, S, ...] -> [B, T, ...], 0 outside `where`."""
  put = jax.vmap(lambda row, at, empty: empty.at[at].set(row))
  empty = jnp.zeros((*where.shape, *x.shape[2:]), x.dtype)
  return jnp.where(jnp.expand_dims(where, range(2, x.ndim)), put(x, columns, empty), 0)


def _filled(x: Array, columns: int) -> Array:
  """[B, T, ...] with zeros behind each row, so that `columns` divides its length."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % columns)) + ((0, 0),) * (x.ndim - 2))


def _split(x: Array, columns: int) -> Array:
  """[B, T, ...] -> [chunks, B, columns, ...]; the last chunk is filled up with zeros."""
  x = _filled(x, columns)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, columns, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
  """[chunks, B, columns, ...] -> [B, length, ...], the inverse of `_split`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
