"""Counts in the text of a compiled program: collectives and products, loop bodies times their trips.

The text is `compiled.as_text()` of `jax.jit(f).lower(...).compile()`, for one device of a mesh. The cost
analysis of XLA counts the body of a loop once, so a model whose layers are scanned needs this count.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Bits of an element whose type does not end with them.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_SHAPE = re.compile(r'([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\]')
_LAYOUT = re.compile(_SHAPE.pattern + r'(\{[^}]*\})?')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
# A comment such as /*index=5*/ in a long tuple.
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(r'\b(?:calls|body|condition|called_computations)=\{?%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)')
# Groups along axes of a mesh, whose devices may be listed in another order.
_MESHED = re.compile(
  r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
)
_CHANNEL = re.compile(r'channel_id=(\d+)')


class Op(NamedTuple):
  """One instruction of a program."""

  name: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # types and sizes of its results
  kind: str
  rest: str  # operands and attributes, as text
  layouts: tuple[str, ...] = ()  # of its results, as text; '' where there is none


class Collective(NamedTuple):
  """Collectives of one kind over the same axes of the mesh."""

  kind: str
  axes: str  # of the mesh that the devices of a group differ in, such as 'fsdp' or 'data+fsdp'
  count: int  # how often they run
  moved: float  # bytes that a device receives, of a ring


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
  """The instructions of all computations by name, and the name of the entry.

  Raises:
    ValueError: the text has no entry.
  """
  found: dict[str, list[Op]] = {}
  entry, current = '', None
  for line in _COMMENT.sub('', text).splitlines():
    if head := _HEAD.match(line):
      current = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (one := _LINE.match(line)):
      layouts = tuple(found[3] or '' for found in _LAYOUT.finditer(one[2]))
      current.append(Op(one[1], _shapes(one[2]), one[3], one[4], layouts))
  if not entry:
    raise ValueError('the text is no HLO module: it has no ENTRY computation')
  return found, entry


def size(shape: tuple[str, Sequence[int]]) -> float:
  """Bytes of an array of a type and sizes.

  >>> size(('bf16', (4, 8)))
  64.0
  >>> size(('s4', (4, 8)))
  16.0
  """
  kind, sizes = shape
  digits = re.match(r'[a-z]+(\d+)', kind)
  bits = _BITS[kind] if kind in _BITS else int(digits[1]) if digits else 8
  return math.prod(sizes) * bits / 8


def runs(computations: dict[str, list[Op]], entry: str, outermost: bool = True) -> dict[str, float]:
  """How often each computation runs in one call of the program.

  A loop whose number of trips the text does not tell counts once, and so does every branch of a
  conditional, of which only one runs.

  Args:
    outermost: whether loops that are in no other loop count with all of their trips; False: with one.
  """
  times = collections.Counter({entry: 1.0})
  for name in _in_call_order(computations, entry):
    for op in computations[name]:
      counts = op.kind == 'while' and (outermost or name != entry)
      trips = _trips(op, computations) if counts else 1
      for called in _called(op):
        times[called] += times[name] * trips
  return dict(times)


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
  """Collectives of a program by kind and axes, those that move most bytes first.

  The bytes that a device receives, with n devices in a group: all-gather (n - 1) / n of the result,
  reduce-scatter n - 1 results, all-reduce 2 (n - 1) / n, all-to-all (n - 1) / n, collective-permute one
  result.

  Args:
    mesh: sizes of its axes by name, in the order of the mesh.
  """
  computations, entry = parse(text)
  # A TPU writes one collective several times, with one channel, where pieces of it are done beside the
  # trips of a loop. It runs as often as its first piece, outside of that loop.
  found: dict[tuple, tuple[float, Op]] = {}
  for name, times in runs(computations, entry).items():
    for op in computations[name]:
      if name.startswith('all-reduce-scatter') and op.kind == 'all-reduce':
        # A TPU's reduce-scatter is one fused computation, whose root is the piece of a device.
        op = op._replace(kind='reduce-scatter', shapes=computations[name][-1].shapes)
      if op.kind.removesuffix('-start') in KINDS:
        channel = 'async_collective_fusion_config' in op.rest and _CHANNEL.search(op.rest)
        key = (channel[1],) if channel else (name, op.name)
        found[key] = min(found.get(key, (math.inf, op)), (times, op), key=lambda one: one[0])
  counts, moved = collections.Counter(), collections.Counter()
  for times, op in found.values():
    kind = op.kind.removesuffix('-start')
    groups = _groups(op, math.prod(mesh.values()))
    key = kind, _axes(groups, mesh)
    counts[key] += times
    moved[key] += times * _received(op, kind, len(groups[0]))
  order = sorted(moved, key=lambda key: (-moved[key], key))
  return [Collective(*key, round(counts[key]), moved[key]) for key in order]


def product_flops(text: str) -> float:
  """Operations of all matrix products of a program on one device; a product and a sum are two.

  Products inside kernels (custom calls) are not seen.
  """
  computations, entry = parse(text)
  total = 0.0
  for name, times in runs(computations, entry).items():
    shapes = {op.name: op.shapes[0] for op in computations[name] if op.shapes}
    for op in computations[name]:
      total += times * _flops(op, shapes)
  return total


class Memory(NamedTuple):
  """Bytes that a program reads from and writes to the main memory of its device."""

  read: float
  written: float
  copied: tuple[str, ...]  # large arrays that it copies, transposes or converts by themselves


def main_memory(text: str, large: float = 2**20) -> Memory:
  """Counts in a program for a TPU, whose text says which arrays are in main memory, and how tiled.

  What a fusion reads of an array is counted: rows that are looked up, no array that it updates in place.
  Arrays count with the padding of their tiles. Outermost loops and all branches of conditionals count
  once, and loops inside of loops as often as they run. So the number of a loop of decoding, with a loop
  over layers inside, is that of one step.

  Args:
    large: bytes from which on copied arrays are named.
  """
  computations, entry = parse(text)
  inside = {n for ops in computations.values() for op in ops if _is_fusion(op) for n in _called(op)}
  read = written = 0.0
  copied = []
  for name, times in runs(computations, entry, outermost=False).items():
    if name in inside:
      continue
    ops = {op.name: op for op in computations[name]}
    for op in computations[name]:
      if op.kind in _NOTHING or op.kind.endswith('-done'):
        continue
      operands = [ops[n] for n in _operands(op) if n in ops]
      if op.kind in ('copy-start', 'slice-start'):
        to = 0 if op.kind == 'copy-start' else 1
        moved = _tiled(op, to)
        read += times * moved * _in_main(operands[0])
        written += times * moved * _in_main(op, to)
        within = _in_main(operands[0]) and _in_main(op, to)
        copied += [str(op.shapes[to])] * (moved >= large and within)
        continue
      for i, operand in enumerate(operands):
        if operand.shapes and _in_main(operand):
          read += times * _read(op, i, operand, computations)
      made = _written(op, computations)
      written += times * made
      alone = op.kind in ('copy', 'transpose', 'convert') or (
        _is_fusion(op) and _moves(op, computations)
      )
      copied += [str(op.shapes[0])] * bool(alone and made >= large)
  return Memory(read, written, tuple(copied))


# Instructions that move nothing.
_NOTHING = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'iota', 'broadcast',
}  # fmt: skip

_VIEWS = {'parameter', 'bitcast', 'tuple', 'reshape'}


def _is_fusion(op: Op) -> bool:
  return op.kind == 'fusion'


def _in_main(op: Op, result: int = 0) -> bool:
  """Whether a result of an instruction is in main memory: others name their memory space."""
  return 'S(' not in (op.layouts[result] or '')


def _tiled(op: Op, result: int = 0) -> float:
  """Bytes of a result with the padding of its tiles.

  >>> _tiled(Op('x', (('bf16', (3, 64)),), 'copy', '', ('{1,0:T(8,128)(2,1)}',)))
  2048.0
  """
  kind, sizes = op.shapes[result]
  layout = re.match(r'\{([\d,]*)(?::T\(([\d,]+)\))?', op.layouts[result] or '')
  if layout and layout[2]:
    sizes, tile = list(sizes), [int(n) for n in layout[2].split(',')]
    minor = [int(n) for n in layout[1].split(',') if n]
    for axis, each in zip(minor, reversed(tile)):
      sizes[axis] = -(-sizes[axis] // each) * each
  return size((kind, sizes))


def _read(op: Op, index: int, operand: Op, computations: dict[str, list[Op]]) -> float:
  """Bytes that an instruction reads of one of its operands."""
  if op.kind in ('dynamic-slice', 'gather', 'slice') and index == 0:
    return min(_tiled(op), _tiled(operand))
  if op.kind == 'dynamic-update-slice' and index == 0:
    return 0.0
  if not _is_fusion(op):
    return _tiled(operand)
  [called] = _called(op)
  body = computations[called]
  of = [one for one in body if one.kind == 'parameter' and one.rest.startswith(f'{index})')]
  return min(_tiled(operand), _read_inside(of[0], body, computations) if of else 0.0)


def _read_inside(source: Op, body: list[Op], computations: dict[str, list[Op]]) -> float:
  """Bytes that the instructions of a fusion read of an array."""
  total = 0.0
  for op in body:
    names = _operands(op)
    for index in [i for i, name in enumerate(names) if name == source.name]:
      if op.kind == 'bitcast' or (_is_fusion(op) and _same(op, computations)):
        total += _read_inside(op, body, computations)
      else:
        total += _read(op, index, source, computations)
  return total


def _written(op: Op, computations: dict[str, list[Op]]) -> float:
  """Bytes that an instruction writes to main memory."""
  if op.kind in ('dynamic-update-slice', 'fusion'):
    updates = _updates(op, computations)
    sizes = [_tiled(op, i) for i in range(len(op.shapes))]
    changed = [min(whole, new) for whole, new in zip(sizes, updates)]
    return sum(n for i, n in enumerate(changed) if _in_main(op, i))
  return sum(_tiled(op, i) for i in range(len(op.shapes)) if _in_main(op, i))


def _updates(op: Op, computations: dict[str, list[Op]], body: list[Op] = ()) -> list[float]:
  """Bytes of each result that an instruction changes: of one that it updates in place, the new part."""
  if op.kind == 'dynamic-update-slice':
    new = [one for one in body if one.name == _operands(op)[1]]
    return [_tiled(new[0]) if new else 0.0]
  if _is_fusion(op):
    [called] = _called(op)
    inner = computations[called]
    return _updates(inner[-1], computations, inner)
  if op.kind in ('tuple', 'bitcast'):
    of = {one.name: one for one in body}
    return [n for name in _operands(op) for n in _updates(of[name], computations, body)]
  return [_tiled(op, i) for i in range(len(op.shapes))]


def _moves(op: Op, computations: dict[str, list[Op]]) -> bool:
  """Whether a fusion only copies, transposes or converts."""
  kinds = _kinds(op, computations)
  return bool(kinds) and kinds <= {'copy', 'transpose', 'convert'}


def _same(op: Op, computations: dict[str, list[Op]]) -> bool:
  """Whether a fusion within another one only says how the array is laid out."""
  if 'output_to_operand_aliasing' in op.rest:
    return True
  [called] = _called(op)
  inner = [one for one in computations[called] if one.kind not in _VIEWS]
  return all(_is_fusion(one) and _same(one, computations) for one in inner)


def _kinds(op: Op, computations: dict[str, list[Op]]) -> set[str]:
  """Kinds of the instructions of a fusion that do something."""
  [called] = _called(op)
  return {one.kind for one in computations[called]} - _VIEWS


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  sizes = lambda found: tuple(int(n.strip('<=')) for n in found.split(',') if n)
  return tuple((kind, sizes(found)) for kind, found in _SHAPE.findall(text))


def _called(op: Op) -> list[str]:
  """Computations that an instruction runs; the functions of reductions are no computations here."""
  names = _CALLED.findall(op.rest)
  for several, one in _BRANCHES.findall(op.rest):
    names += [n.strip().lstrip('%') for n in several.split(',')] if several else [one]
  if op.kind == 'call':
    names += re.findall(r'to_apply=%?([\w.\-]+)', op.rest)
  return names


def _in_call_order(computations: dict[str, list[Op]], entry: str) -> list[str]:
  """Names of the computations that run, each after all that call it."""
  order, seen = [], set()

  def visit(name: str) -> None:
    if name in seen:
      return
    seen.add(name)
    for op in computations[name]:
      for called in _called(op):
        visit(called)
    order.append(name)

  visit(entry)
  return order[::-1]


def _trips(op: Op, computations: dict[str, list[Op]]) -> int:
  """Trips of a loop: those that the compiler noted, or the bound that its condition compares with."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', op.rest)
  ops = computations[condition[1]] if condition else []
  bounds = [
    int(found[1])
    for one in ops
    if one.kind == 'constant' and (found := re.match(r'(\d+)\)', one.rest))
  ]
  return -(-bounds[0] // _step(op, computations)) if len(bounds) == 1 else 1


def _step(op: Op, computations: dict[str, list[Op]]) -> int:
  """What a loop adds to its counter in a trip: 2, for example, where the compiler has unrolled it.

  The counter is the element of the loop's tuple that the condition reads. The condition names it by an
  instruction (`get-tuple-element`) or, as newer compilers write it, by its number: `%tuple#4`.
  """
  name = lambda kind: re.search(rf'{kind}=%?([\w.\-]+)', op.rest)[1]
  body = {one.name: one for one in computations[name('body')]}
  condition = computations[name('condition')]
  read = [re.search(r'index=(\d+)', x.rest)[1] for x in condition if x.kind == 'get-tuple-element']
  read += [n for x in condition if x.kind == 'compare' for n in re.findall(r'#(\d+)', x.rest)]
  last = computations[name('body')][-1]
  if len(read) != 1 or last.kind != 'tuple':
    return 1
  made = body.get(_operands(last)[int(read[0])])
  if made is None or made.kind != 'add':
    return 1
  steps = [
    int(found[1])
    for one in map(body.get, _operands(made))
    if one is not None and one.kind == 'constant' and (found := re.match(r'(\d+)\)', one.rest))
  ]
  return max(steps, default=1) or 1


def _operands(op: Op) -> list[str]:
  """Names of the operands of an instruction."""
  return re.findall(r'%([\w.\-]+)', op.rest.split(')')[0])


def _groups(op: Op, devices: int) -> list[list[int]]:
  """The groups of devices that an instruction runs in; of a permutation, its pairs that move."""
  if pairs := re.search(r'source_target_pairs=\{(.*?\})\}', op.rest):
    found = [list(map(int, p)) for p in re.findall(r'\{(\d+),(\d+)\}', pairs[1] + '}')]
    return [pair for pair in found if pair[0] != pair[1]] or [[0]]
  if short := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', op.rest):
    ints = lambda text: list(map(int, text.split(',')))
    ids = np.arange(math.prod(ints(short[2]))).reshape(ints(short[2]))
    ids = ids.transpose(ints(short[3])) if short[3] else ids
    return ids.reshape(ints(short[1])).tolist()
  if meshed := _MESHED.search(op.rest):
    return _along_axes(*meshed.groups())
  if named := re.search(r'replica_groups=\{(\{.*?\})\}', op.rest):
    return [list(map(int, g.split(','))) for g in re.findall(r'\{([\d,]+)\}', named[1])]
  return [list(range(devices))]


def _along_axes(mesh: str, order: str | None, turned: str | None, axes: str) -> list[list[int]]:
  """Groups along axes of a mesh.

  A part of an axis is written with the size of what lies before it in the axis, and with its own size.

  >>> _along_axes("'a'=2,'b'=2", None, None, "'b'")
  [[0, 1], [2, 3]]
  >>> _along_axes("'a'=4", None, None, "'a':(1)2")
  [[0, 2], [1, 3]]
  >>> _along_axes("'a'=2,'b'=2", '2,2', '1,0', "'b'")
  [[0, 2], [1, 3]]

  Args:
    order, turned: the devices of the mesh, where they are not in their order: sizes of an array of all
      of them, and the order of its axes.
  """
  sizes, taken = [], []
  used = {name: part for name, *part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
  for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
    before, part = (int(n or 0) for n in used.get(name, ('', '')))
    pieces = [before, part, int(size) // (before * part)] if part else [1, int(size), 1]
    taken += [False, name in used, False]
    sizes += pieces
  ids = np.arange(math.prod(sizes))
  if order:
    ints = lambda text: [int(n) for n in text.split(',')]
    ids = ids.reshape(ints(order)).transpose(ints(turned) if turned else None)
  last = sorted(range(len(sizes)), key=lambda i: taken[i])
  ids = ids.reshape(sizes).transpose(last)
  return ids.reshape(-1, math.prod(n for n, own in zip(sizes, taken) if own)).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh: dict[str, int]) -> str:
  """Axes of the mesh in which the devices of a group differ."""
  places = [np.array(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
  differ = [any(len(set(place[i])) > 1 for place in places) for i in range(len(mesh))]
  return '+'.join(name for name, moves in zip(mesh, differ, strict=True) if moves) or 'none'


def _received(op: Op, kind: str, n: int) -> float:
  """Bytes that a device receives; the start of an asynchronous collective also lists its operands."""
  shapes = op.shapes
  if op.kind.endswith('-start') and kind in ('all-gather', 'collective-permute'):
    arrays = [shape for shape in shapes if shape[1] or shape[0] not in ('u32', 's32')]
    shapes = arrays[len(arrays) // 2 :]
  bytes_ = sum(map(size, shapes))
  if kind == 'collective-permute':
    return bytes_ if n > 1 else 0.0
  if kind == 'reduce-scatter':
    return bytes_ * (n - 1)
  return bytes_ * (2 if kind == 'all-reduce' else 1) * (n - 1) / n


def _flops(op: Op, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> float:
  if op.kind not in ('dot', 'convolution') or not op.shapes:
    return 0.0
  lhs, rhs = (shapes[name][1] for name in _operands(op)[:2])
  if op.kind == 'convolution':
    return _convolution_flops(op, lhs, rhs)
  dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', op.rest)
  summed = [lhs[int(i)] for i in dims[1].split(',') if i] if dims else []
  return 2.0 * math.prod(op.shapes[0][1]) * math.prod(summed)


def _convolution_flops(op: Op, lhs: Sequence[int], rhs: Sequence[int]) -> float:
  """Operations of a convolution, as which a TPU writes products.

  Windows that reach into padding, or into holes of a dilated input, are not counted there: in this way
  a dimension of the window is a batch dimension of the product, or one of its results.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.rest)
  of = lambda label, which, sizes: sizes[labels[which].index(label)]
  groups = re.search(r'batch_group_count=(\d+)', op.rest)
  total = 2.0 * of('b', 1, lhs) * of('i', 2, rhs) * of('o', 2, rhs)
  total /= int(groups[1]) if groups else 1
  window = re.search(r'window=\{([^}]*)\}', op.rest)
  fields = dict(one.split('=') for one in window[1].split()) if window else {}
  for i, size in enumerate(fields['size'].split('x') if window else ()):
    field = lambda name, default, i=i: fields[name].split('x')[i] if name in fields else default
    total *= _pairs(
      int(size),
      of(str(i), 1, lhs),
      of(str(i), 3, op.shapes[0][1]),
      stride=int(field('stride', '1')),
      before=int(field('pad', '0_0').split('_')[0]),
      input_dilation=int(field('lhs_dilate', '1')),
      window_dilation=int(field('rhs_dilate', '1')),
    )
  return total


def _pairs(
  window: int,
  inputs: int,
  outputs: int,
  *,
  stride: int,
  before: int,
  input_dilation: int,
  window_dilation: int,
) -> int:
  """Pairs of a result and a place of its window, along one dimension, that read an input.

  >>> _pairs(2, 4, 3, stride=1, before=0, input_dilation=1, window_dilation=1)
  6
  >>> _pairs(16, 1, 16, stride=1, before=15, input_dilation=1, window_dilation=1)
  16

  Args:
    before: entries of padding in front of the inputs.
    input_dilation: distance of two inputs, between which are zeros.
    window_dilation: distance of two places of the window.
  """
  starts = np.arange(outputs) * stride - before
  found = 0
  for place in range(window):
    read = starts + place * window_dilation
    inside = (read >= 0) & (read <= (inputs - 1) * input_dilation)
    found += int(np.sum(inside & (read % input_dilation == 0)))
  return found
