"""How near the gradient of an update comes to its matrix products alone, and where the rest goes.

    python -m benchmarks.limit                            # tiny GRPO, SFT, and SmolLM2-135M
    python -m benchmarks.limit --works sft --repeats=9
    python -m benchmarks.limit --smollm2=FOLDER           # a checkpoint that is there already

The works are those of `benchmarks.compare`, with random completions. Every product of the gradient is
also compiled as a program by itself, of the same shapes and axes, and runs in turn with the gradient;
its seconds count as often as the gradient takes that product. A rate is the FLOPs of these products,
over the seconds of the gradient or of the products. Both are given by the clock and by CPU time: on a
machine that is shared, CPU time is the one to read; the clock also counts cores that wait for one which
works.

The second table is from a trace of the program: milliseconds by part of the model, in products and in
all else. What a compiler fuses into a product counts as part of it.
"""

import argparse
import collections
import functools
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import compare
from benchmarks.peers import polgrad_worker
from polgrad import compiling, hlo, phases, sharding
from polgrad.compiling import jit
from polgrad.models.policy import learned
from polgrad.types import Batch

WORKS = ('grpo', 'sft', 'smollm2')
# Parts by what the name of an operation has in it; the first one that fits.
PARTS = {
  # Copies and zeros that no function asks for have no name: XLA lays out the buffers of the loop.
  'residuals of the scan over layers': r'dynamic_(update_)?(index_in_dim|slice)|/broadcast_in_dim$|^$',
  'attention': r'attend',
  'MLP': r'\bmlp\b|layers\.mlp',
  'norms': r'\.norm|\.before|\.after|normalise',
  'queries, keys, values, output': r'project|finish|dense',
  'embedding': r'embed\b|_take',
  'logits, loss': r'',
}


class Product(NamedTuple):
  """A matrix product by its operands: shapes, types, and which axes are summed or paired."""

  left: tuple[int, ...]
  right: tuple[int, ...]
  types: tuple[str, str, str]
  axes: tuple
  precision: Any

  def flops(self) -> float:
    (summed, _), (paired, _) = self.axes
    rows = np.prod(self.left) * np.prod(self.right, dtype=float)
    shared = np.prod([self.left[i] for i in summed]), np.prod([self.left[i] for i in paired])
    return float(2 * rows / (shared[0] * shared[1]))

  def program(self) -> Callable[[], Any]:
    """A call of the product alone."""
    keys = jax.random.split(jax.random.key(0))
    shapes = zip(keys, (self.left, self.right), self.types[:2])
    operands = [jax.random.normal(key, shape, dtype) for key, shape, dtype in shapes]
    settings = dict(precision=self.precision, preferred_element_type=self.types[2])
    run = jit(functools.partial(jax.lax.dot_general, dimension_numbers=self.axes, **settings))
    return lambda: jax.block_until_ready(run(*operands))


def products(jaxpr: Any, times: int = 1) -> Iterator[tuple[Product, int]]:
  """Every product of a traced function, and how often it is taken: bodies of loops times their trips."""
  for equation in jaxpr.eqns:
    inside = (
      times * equation.params.get('length', 1) if equation.primitive.name == 'scan' else times
    )
    if equation.primitive.name == 'dot_general':
      left, right = (x.aval for x in equation.invars)
      types = tuple(str(x.aval.dtype) for x in (*equation.invars, *equation.outvars))
      given = (equation.params[name] for name in ('dimension_numbers', 'precision'))
      yield Product(left.shape, right.shape, types, *given), times
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        yield from products(getattr(value, 'jaxpr', value), inside)


def _is_jaxpr(x: Any) -> bool:
  return hasattr(x, 'eqns') or hasattr(x, 'jaxpr')


def random_batch(kind: str, work: dict, layout: Any) -> Batch:
  """The rows of a work, with completions and what a rollout knows of them drawn at random."""
  random = np.random.default_rng(0)
  if kind == 'sft':
    tokens, start, group = np.array(work['sft'], np.int32), 1, 1
  else:
    prompts = np.repeat(np.array(work['prompts'], np.int32), work['samples'], axis=0)
    size = len(prompts), work['new_tokens']
    own = random.integers(1, work['vocabulary'], size, dtype=np.int32)
    tokens, start, group = np.concatenate([prompts, own], 1), prompts.shape[1], work['samples']
  batch = Batch(
    tokens=tokens,
    segment_ids=np.ones_like(tokens),
    mask=np.broadcast_to(np.arange(tokens.shape[1]) >= start, tokens.shape),
    group_ids=np.arange(len(tokens), dtype=np.int32) // group,
    layout=layout,
  )
  if kind == 'sft':
    return batch
  logp = np.full(tokens.shape, -np.log(work['vocabulary']), np.float32)
  names = ('behavior_logp', 'proximal_logp', 'reference_logp')
  advantages = random.normal(size=tokens.shape).astype(np.float32)
  return batch.with_arrays(advantages=advantages, **dict.fromkeys(names, logp))


def seconds(run: Callable[[], Any]) -> np.ndarray:
  """By the clock and of CPU time."""
  clock, cpu = time.perf_counter(), time.process_time()
  run()
  return np.array([time.perf_counter() - clock, time.process_time() - cpu])


def measure(kind: str, folder: pathlib.Path, repeats: int) -> list[str]:
  """The lines of a work."""
  worker = compare.KINDS[kind].worker
  work, experiment = polgrad_worker.prepare(folder, worker)
  phase = experiment.phases['main']
  with jax.set_mesh(experiment.mesh):
    state = phases.begin(experiment, 0, None)
    batch = random_batch(worker, work, phases.context(experiment, phase, 0).layout)
    batch = sharding.place_batch(experiment.mesh, batch)
    function = phase.learner(experiment.policy).gradient
    arguments = state, learned(experiment.policy, state.params), batch
    traced = jit(function).trace(*arguments)
    program = traced.lower().compile()
    run = lambda: jax.block_until_ready(program(*arguments))
    counts = collections.Counter()
    for product, times in products(traced.jaxpr.jaxpr):
      counts[product] += times
    alone = {product: product.program() for product in counts}
    for call in (run, *alone.values()):
      call()
    of_gradient, of_products = [], []
    for _ in range(repeats):
      of_gradient.append(seconds(run))
      of_products.append(sum(times * seconds(alone[product]) for product, times in counts.items()))
    spent = by_part(run, program.as_text(), max(2, repeats // 2))
  flops = sum(times * product.flops() for product, times in counts.items())
  whole, bare = (np.median(x, axis=0) for x in (of_gradient, of_products))
  each = np.array(of_products) / np.array(of_gradient)
  rows = [
    f'| {compare.KINDS[kind].title} | products alone | gradient | part of the rate |',
    '|---|---|---|---|',
  ]
  for i, name in enumerate(('by the clock', 'of CPU time')):
    told = [f'{flops / x[i] / 1e9:.0f} GFLOP/s ({x[i]:.3f} s)' for x in (bare, whole)]
    ratio = statistics.median(each[:, i])
    spread = f'{ratio:.0%} ({each[:, i].min():.0%} to {each[:, i].max():.0%})'
    rows.append(f'| {name}, {flops / 1e9:.0f} GFLOP | {told[0]} | {told[1]} | {spread} |')
  rows += ['', '| part | in products | in all else |', '|---|---|---|']
  for part in PARTS:
    told = [f'{spent[part, kind]:.0f} ms' for kind in (True, False)]
    rows.append(f'| {part} | {told[0]} | {told[1]} |')
  return [*rows, '']


def by_part(run: Callable, text: str, repeats: int) -> collections.Counter:
  """Milliseconds of one run by (part, whether in a product), medians of the events of a trace."""
  computations, _ = hlo.parse(text)
  multiplies = {name for name, ops in computations.items() if any(op.kind == 'dot' for op in ops)}
  kinds = {}
  for op in (op for ops in computations.values() for op in ops):
    called = re.search(r'calls=%?([\w.\-]+)', op.rest)
    product = op.kind == 'dot' or (op.kind == 'fusion' and called and called[1] in multiplies)
    told = re.search(r'op_name="([^"]*)"', op.rest)
    name = told[1] if told else ''
    part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
    if op.kind not in ('while', 'call', 'conditional') or 'scatter' in name:
      kinds[op.name] = part, bool(product)
  options = jax.profiler.ProfileOptions()
  options.host_tracer_level, options.python_tracer_level = 3, 0
  events = collections.defaultdict(list)
  with tempfile.TemporaryDirectory() as place:
    with jax.profiler.trace(place, profiler_options=options):
      for _ in range(repeats):
        run()
    [path] = pathlib.Path(place).rglob('*.xplane.pb')
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      for line in plane.lines:
        for event in line.events:
          events[event.name].append(event.duration_ns / 1e6)
  spent = collections.Counter()
  for name, found in events.items():
    if name in kinds:
      spent[kinds[name]] += statistics.median(found) * len(found) / repeats
  return spent


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--works', nargs='*', default=list(WORKS), choices=WORKS)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--smollm2', default=str(pathlib.Path('~/.cache/polgrad/peers/smollm2').expanduser())
  )
  given = parser.parse_args()
  if not compare.ENVIRONMENT.items() <= os.environ.items():  # malloc reads it when a process begins
    program = [sys.executable, '-m', 'benchmarks.limit', *sys.argv[1:]]
    os.execve(sys.executable, program, os.environ | compare.ENVIRONMENT)
  checkpoint = pathlib.Path(given.smollm2)
  if 'smollm2' in given.works and not checkpoint.exists():
    fetch = compare.HERE.parent / 'launch' / 'fetch_smollm2.py'
    subprocess.run([sys.executable, str(fetch), str(checkpoint)], check=True)
  for kind in given.works:
    with tempfile.TemporaryDirectory() as place:
      compare.write_work(pathlib.Path(place), compare.KINDS[kind], checkpoint)
      print('\n'.join(measure(kind, pathlib.Path(place), given.repeats)), flush=True)


if __name__ == '__main__':
  compiling.prepare()
  compiling.in_one_chunk(main)()
