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
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
# A comment such as /*index=5*/ in a long tuple.
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(r'\b(?:calls|body|condition|called_computations)=\{?%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)')
_CHANNEL = re.compile(r'channel_id=(\d+)')


class Op(NamedTuple):
  """One instruction of a program."""

  name: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # types and sizes of its results
  kind: str
  rest: str  # operands and attributes, as text


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
      current.append(Op(one[1], _shapes(one[2]), one[3], one[4]))
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


def runs(computations: dict[str, list[Op]], entry: str) -> dict[str, float]:
  """How often each computation runs in one call of the program.

  A loop whose number of trips the text does not tell counts once, and so does every branch of a
  conditional, of which only one runs.
  """
  times = collections.Counter({entry: 1.0})
  for name in _in_call_order(computations, entry):
    for op in computations[name]:
      trips = _trips(op, computations) if op.kind == 'while' else 1
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

  The counter is the element of the loop's tuple that the condition reads.
  """
  name = lambda kind: re.search(rf'{kind}=%?([\w.\-]+)', op.rest)[1]
  body = {one.name: one for one in computations[name('body')]}
  read = [one for one in computations[name('condition')] if one.kind == 'get-tuple-element']
  last = computations[name('body')][-1]
  if len(read) != 1 or last.kind != 'tuple':
    return 1
  index = int(re.search(r'index=(\d+)', read[0].rest)[1])
  made = body.get(_operands(last)[index])
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
  if meshed := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', op.rest):
    return _along_axes(*meshed.groups())
  if named := re.search(r'replica_groups=\{(\{.*?\})\}', op.rest):
    return [list(map(int, g.split(','))) for g in re.findall(r'\{([\d,]+)\}', named[1])]
  return [list(range(devices))]


def _along_axes(mesh: str, axes: str) -> list[list[int]]:
  """Groups along axes of a mesh of all devices in their order.

  A part of an axis is written with the size of what lies before it in the axis, and with its own size.

  >>> _along_axes("'a'=2,'b'=2", "'b'")
  [[0, 1], [2, 3]]
  >>> _along_axes("'a'=4", "'a':(1)2")
  [[0, 2], [1, 3]]
  """
  sizes, taken = [], []
  used = {name: part for name, *part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
  for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
    before, part = (int(n or 0) for n in used.get(name, ('', '')))
    pieces = [before, part, int(size) // (before * part)] if part else [1, int(size), 1]
    taken += [False, name in used, False]
    sizes += pieces
  order = sorted(range(len(sizes)), key=lambda i: taken[i])
  ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
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
