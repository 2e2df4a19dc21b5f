"""Compiles the programs of a run for a TPU topology that is not there, and says whether they fit it.

    pip install libtpu
    python -m polgrad.preflight --config=experiments/run.py:method=grpo,task=addition,model=tiny \\
      --topology=v5e:4x4 --shape=qwen3_0_6b --config.mesh.fsdp=16 --config.mesh.data=1

Nothing runs, and no weights are needed. Of every phase it compiles the update, the log-probs of an
anchor, the prefill of a sampler and one step of its decoding, and reports for a chip: memory by the
compiler's count, operations and bytes counted by hand, the least time that these take, and collectives
counted in the compiled program. Exit code 1: a program does not fit into memory. docs/preflight.md
explains the numbers.
"""

import functools
import json
import math
import os
import re
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from polgrad import build, cli, hlo, models, phases, sharding, speed
from polgrad.checks import tables, tracing
from polgrad.learner import forward_in_pieces
from polgrad.models.policy import Policy, learned
from polgrad.registry import part
from polgrad.sampling import sampler as sampling
from polgrad.sampling.decoding import Sampler
from polgrad.types import PLAIN, Batch

_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:4x4', 'Generation and shape of the slice.')
_SHAPE = flags.DEFINE_string(
  'shape', '', 'Sizes of a published model that take the place of config.model, see SHAPES.'
)

_PHASE = flags.DEFINE_string('only_phase', '', 'The only phase to compile; "": all phases.')


class Chip(NamedTuple):
  """What a chip has, as Google publishes it."""

  memory: float  # bytes
  bandwidth: float  # bytes a second, of its memory
  links: float  # bytes a second, over all its links to other chips


# By words of `device_kind`; operations a second are in `speed.PEAKS`.
CHIPS = {
  'TPU v4': Chip(32 * 2**30, 1228e9, 300e9),
  'TPU v5 lite': Chip(16 * 2**30, 819e9, 200e9),
  'TPU v5': Chip(95 * 2**30, 2765e9, 600e9),
  'TPU v6 lite': Chip(32 * 2**30, 1640e9, 448e9),
}

_QWEN3 = dict(vocab_size=151_936, head_dim=128, qk_norm='head', rope_theta=1e6)
# Sizes in the config.json of published models; weights are not needed.
SHAPES = {
  'qwen3_0_6b': _QWEN3 | dict(num_layers=28, width=1024, num_heads=16, num_kv_heads=8, mlp_width=3072),
  'llama3_8b': dict(
    vocab_size=128_256, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
    mlp_width=14_336, rope_theta=5e5, tie_embeddings=False,
  ),
  'gemma3_27b': dict(
    vocab_size=262_208, num_layers=62, width=5376, num_heads=32, num_kv_heads=16, head_dim=128,
    mlp_width=21_504, activation='gelu', qk_norm='head', rope_theta=1e6, rope_factor=8.0, window=1024,
    local_layers=tuple(i for i in range(62) if i % 6 != 5), norm_offset=1.0, post_norm=True,
    query_scale=168**-0.5, embedding_scale=5376**0.5,
  ),
  'qwen3_30b_a3b': _QWEN3 | dict(
    num_layers=48, width=2048, num_heads=32, num_kv_heads=4, mlp_width=768, num_experts=128,
    experts_per_token=8, tie_embeddings=False,
  ),
}  # fmt: skip


class Program(NamedTuple):
  """What is known of one compiled program, on one chip."""

  name: str
  memory: float  # bytes that it holds at most: arguments, results and temporary arrays
  temporary: float  # bytes of the latter
  flops: float  # counted by hand
  compiled_flops: float  # of products in the compiled program; those in kernels are not seen
  bytes: float  # of memory that must be read and written, counted by hand
  collectives: list[hlo.Collective]
  least_moved: float  # bytes that must be received from other chips, counted by hand
  seconds: float  # of compilation
  error: str = ''  # of the compiler

  @property
  def moved(self) -> float:
    """Bytes received from other chips; the least where the compiled program could not be read."""
    if math.isnan(self.compiled_flops):
      return self.least_moved
    return sum(one.moved for one in self.collectives)


class Bound(NamedTuple):
  """The least time of a program, and why."""

  seconds: float
  limit: str  # 'products', 'memory' or 'links'
  mfu: float  # the fraction of the peak that is reached in this time


def bound(program: Program, chip: Chip, peak: float) -> Bound:
  """The longest of the times for products, memory and links, as if each overlapped the others.

  >>> one = Program('update', 0, 0, 100.0, 0, 10.0, [], 0, 0)
  >>> bound(one, Chip(0, 1.0, 1.0), 20.0)
  Bound(seconds=10.0, limit='memory', mfu=0.5)
  """
  times = {
    'products': program.flops / peak,
    'memory': program.bytes / chip.bandwidth,
    'links': program.moved / chip.links,
  }
  limit = max(times, key=times.get)
  most = times[limit]
  return Bound(most, limit, program.flops / peak / most if most else 0.0)


def verdict(program: Program, chip: Chip, peak: float) -> str:
  """Whether a program fits, and which knob to turn."""
  if program.error or program.memory > chip.memory:
    arguments = program.memory - program.temporary
    if not program.error and arguments > chip.memory / 2:
      return 'does not fit: the state is large; raise config.mesh.fsdp'
    knobs = {'decode': 'collect.slots', 'prefill': 'fewer records a step'}
    knob = knobs.get(program.name.rpartition(' ')[2], 'more micro_batches, or remat=full')
    return f'does not fit: {knob}'
  limit = bound(program, chip, peak).limit
  knobs = {
    'products': 'fits',
    'memory': 'fits; memory limits: more rows a chip',
    'links': 'fits; links limit: more rows a chip, less mesh.tensor',
  }
  return knobs[limit]


def least_moved(params: float, mesh: dict[str, int], *, activations: float, update: bool) -> float:
  """Bytes that a chip must receive when parameters are sharded over fsdp and tensor.

  Over fsdp the parameters are gathered, (n - 1) / n of them; an update gathers them again in its
  backward pass and scatters as many gradients, which are then added up over data. Over tensor,
  activations are added up.

  Args:
    params: bytes of the parameters in the type of activations, without their cut over fsdp.
    activations: bytes of all activations of the forward pass that are added up over tensor.
  """
  part = lambda n: (n - 1) / n
  passes = 3 if update else 1
  moved = passes * params * part(mesh['fsdp'])
  moved += (2 if update else 1) * 2 * activations * part(mesh['tensor'])
  if update:
    moved += 2 * params / mesh['fsdp'] * part(mesh['data'])
  return moved


def replicated(mesh: Any, shapes: Any, least: int = 2**20) -> list[str]:
  """Parameters of at least `least` bytes that no mesh axis cuts, so every device holds them whole."""
  if mesh.shape['fsdp'] * mesh.shape['tensor'] == 1:
    return []
  return [
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    if math.prod(x.shape) * x.dtype.itemsize >= least and x.sharding.is_fully_replicated
  ]


def local(tree: Any) -> float:
  """Bytes of arrays on one device."""
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return float(sum(map(size, jax.tree.leaves(tree))))


def placed_params(policy: Policy, mesh: Any) -> Any:
  """The shapes of parameters with their shardings."""
  shapes = policy.shapes()
  return jax.tree.map(_placed, shapes, sharding.param_shardings(mesh, policy.axes(shapes), shapes))


def placed_state(phase: Any, policy: Policy, mesh: Any) -> Any:
  """The state of a phase as shapes with shardings."""
  state, params = tracing.state_shapes(phase, policy), placed_params(policy, mesh)
  trainable = learned(policy, params)
  anchor = lambda n: placed_params(phase.frozen[n], mesh) if n in phase.frozen else trainable
  whole = NamedSharding(mesh, PartitionSpec())
  small = lambda x: _placed(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), whole)
  opt = lambda optimizer, params, state: jax.tree.map(
    _placed, state, phases.opt_shardings(optimizer, mesh, params)
  )
  state = state.replace(params={}, anchors={}, opt_state=(), learned={}), state
  return jax.tree.map(small, state[0]).replace(
    params=params,
    anchors={n: anchor(n) for n in phase.anchors},
    opt_state=opt(phase.optimizer, trainable, state[1].opt_state),
    learned={
      n: {
        'opt_state': opt(one.learner.optimizer, anchor(n), state[1].learned[n]['opt_state']),
        'objective_state': jax.tree.map(small, state[1].learned[n]['objective_state']),
      }
      for n, one in phase.anchor_learners(policy).items()
    }
    | {
      n: {
        'opt_state': opt(one.learner.optimizer, trainable, state[1].learned[n]['opt_state']),
        'objective_state': jax.tree.map(small, state[1].learned[n]['objective_state']),
      }
      for n, one in phase.further_learners(policy).items()
    },
  )


def programs(name: str, phase: Any, run: build.Experiment) -> list[Program]:
  """Compiles the programs of a phase."""
  mesh, policy, config = run.mesh, run.policy, run.policy.config
  count = phase.collect.rows // phase.minibatches
  layout = phase.layout._replace(pack=0)
  batch = jax.tree.map(
    functools.partial(by_rows, mesh), tracing.batch_shapes(phase, count)
  ).replace(layout=layout)
  state = placed_state(phase, policy, mesh)
  sizes, chips = dict(mesh.shape), mesh.size
  activation = jnp.dtype(config.dtype).itemsize
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  gathered = total * activation / sizes['tensor']
  full = full_batch(count, phase.collect.length, layout.prompt_length)
  # Attention and feed-forward each add up one activation a layer and token over tensor.
  added = lambda tokens: (
    2 * config.num_layers * tokens * config.width * activation / sharding.data_parallel_size(mesh)
  )
  moved = lambda tokens, update: least_moved(
    gathered * (phase.micro_batches if update else 1),
    sizes,
    activations=added(tokens),
    update=update,
  )
  make = functools.partial(compile_program, mesh)
  trained = local(learned(policy, state.params))
  places = jax.tree.map(lambda x: x.sharding, state)
  found = [
    make(
      f'{name} update',
      jax.jit(phase.learner(policy).update, donate_argnums=0, out_shardings=(places, None)),
      (state, batch),
      flops=speed.update_flops(config, full, layout) / chips,
      # Parameters and optimizer are read and written, gradients too; weights are read by both passes.
      bytes=2 * (trained + local(state.opt_state)) + 2 * trained + 3 * gathered,
      least_moved=moved(count * phase.collect.length, True),
    )
  ]
  if phase.anchors:
    score = functools.partial(
      forward_in_pieces, policy, temperature=1.0, micro_batches=phase.micro_batches
    )
    found.append(
      make(
        f'{name} anchor',
        jax.jit(lambda params, batch: score(params, batch).logp),
        (state.params, batch),
        flops=speed.forward_flops(config, full, layout) / chips,
        bytes=gathered,
        least_moved=moved(count * phase.collect.length, False),
      )
    )
  if hasattr(phase.collect, 'max_new_tokens'):
    found += rollouts(name, phase, run, state.params, make, gathered, moved)
  return found


def make_sampler(phase: Any, policy: Policy, mesh: Any) -> Sampler:
  """The sampler of a phase, whose methods are the steps of its program."""
  collect = phase.collect
  return sampling.configure(
    Sampler,
    {},
    mesh,
    default=policy,
    behavior_policy=sampling.behavior_policies.current,
    max_new_tokens=collect.max_new_tokens,
    samples_per_prompt=collect.samples_per_prompt,
    slots=collect.slots,
    stop_ids=(0,),
    pad_id=0,
    temperature=collect.temperature,
    top_k=collect.top_k,
    top_p=collect.top_p,
    token_temperature=sampling.processors.unchanged,
  )


def rollouts(
  name: str, phase: Any, run: build.Experiment, params: Any, make: Any, gathered: float, moved: Any
) -> list[Program]:
  """Compiles the prefill of a sampler and one step of its decoding."""
  mesh, policy, collect = run.mesh, run.policy, phase.collect
  config, chips = policy.config, mesh.size
  one = make_sampler(phase, policy, mesh)
  count, length = collect.records, collect.length
  width = length - collect.max_new_tokens
  shape = lambda dtype, *sizes: by_rows(mesh, jax.ShapeDtypeStruct(sizes, dtype))
  prompts = shape(jnp.int32, count, width), shape(jnp.bool_, count, width)
  [model] = one.policies
  sets = {model: params}
  unstack = lambda sets: {n: policy.unstack(p) for n, p in sets.items()}
  read = lambda sets, tokens, mask: one.prefill(unstack(sets), tokens, mask)
  forward = lambda rows, length, scored: speed.forward_flops(
    config, full_batch(rows, length, scored), PLAIN, logits=False
  )
  prefill = make(
    f'{name} prefill',
    jax.jit(read),
    (sets, *prompts),
    flops=forward(count, width, 0) / chips,
    bytes=gathered,
    least_moved=moved(count * width, False),
  )

  # A step of decoding, as the loop makes it: its state is donated, and layers are cut from their stacks.
  def begin(sets, tokens, mask):
    read_prompts = read(sets, tokens, mask)
    return one.refill(read_prompts, one.start(read_prompts, width))

  with jax.set_mesh(mesh):
    state = jax.tree.map(functools.partial(by_rows, mesh), jax.eval_shape(begin, sets, *prompts))
    flat = jax.eval_shape(unstack, sets)[model]
  flat = {model: jax.tree.map(_placed, flat, unstacked_shardings(policy, mesh, flat))}
  keys = lambda ids: one.row_keys(jnp.int32(0), jnp.int32(0), ids)
  draw = lambda sets, ids, state: one.draw(sets, keys(ids), None, width, state)
  # A new token is multiplied with all weights, sees at most `length` tokens and gets logits.
  rows = one.slots or count * collect.samples_per_prompt
  flops = forward(rows, length, length) - forward(rows, length - 1, length - 1)
  flops += 2.0 * config.vocab_size * config.width * rows
  decode = make(
    f'{name} decode',
    jax.jit(draw, donate_argnums=2),
    (flat, shape(jnp.int32, count), state),
    flops=flops / chips,
    bytes=gathered + local(state.caches),
    least_moved=moved(rows, False),
  )
  return [prefill, decode]


def by_rows(mesh: Any, x: Any) -> jax.ShapeDtypeStruct:
  """The shape of an array with its rows over data and fsdp, or whole if they do not divide."""
  rows = x.ndim and x.shape[0] % sharding.data_parallel_size(mesh) == 0
  whole = NamedSharding(mesh, PartitionSpec())
  return _placed(x, sharding.batch_sharding(mesh, x.ndim) if rows else whole)


def unstacked_shardings(policy: Policy, mesh: Any, flat: Any) -> Any:
  """Shardings of unstacked parameters: those of the stacks, without the axis of layers."""
  stacked = policy.shapes()
  axes = policy.axes(stacked)
  by_name = {}
  for path, x in jax.tree_util.tree_leaves_with_path(stacked):
    found = functools.reduce(lambda tree, key: tree[key.key], path, axes)
    by_name[path[-1].key, tuple(x.shape)] = found

  def place(path, x):
    name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
    for (own, shape), logical in by_name.items():
      if own == name and shape == x.shape:
        return NamedSharding(mesh, sharding.partition_spec(mesh, logical, x.shape))
      if own == name and shape[1:] == x.shape:
        return NamedSharding(mesh, sharding.partition_spec(mesh, logical[1:], x.shape))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(place, flat)


def full_batch(rows: int, length: int, prompt: int) -> Batch:
  """Rows without padding, whose completions begin at column `prompt`."""
  shape = rows, length
  mask = np.broadcast_to(np.arange(length) >= prompt, shape)
  return Batch(tokens=np.zeros(shape, np.int32), segment_ids=np.ones(shape, np.int32), mask=mask)


def compile_program(
  mesh: Any,
  name: str,
  program: Any,
  arguments: tuple,
  *,
  flops: float,
  bytes: float,
  least_moved: float,
) -> Program:
  """Compiles a jitted function for the shapes of its arguments, and looks at the result."""
  started = time.perf_counter()
  counted = dict(flops=flops, bytes=bytes, least_moved=least_moved)
  try:
    with jax.set_mesh(mesh):
      compiled = program.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    used = re.search(r'Used ([\d.]+)([GM]) of', str(error))
    held = float(used[1]) * {'G': 2**30, 'M': 2**20}[used[2]] if used else math.nan
    seconds = time.perf_counter() - started
    text = str(error).splitlines()[0][:300]
    return Program(
      name,
      held,
      math.nan,
      compiled_flops=math.nan,
      collectives=[],
      seconds=seconds,
      error=text,
      **counted,
    )
  seconds = time.perf_counter() - started
  memory = compiled.memory_analysis()
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:  # jaxlib cannot read the instructions of a newer libtpu
    text = ''
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return Program(
    name,
    held - memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    compiled_flops=hlo.product_flops(text) if text else math.nan,
    collectives=hlo.collectives(text, dict(mesh.shape)) if text else [],
    seconds=seconds,
    **counted,
  )


def topology(name: str) -> list[Any]:
  """The devices of a TPU topology that is not there.

  Raises:
    ImportError: libtpu is not installed.
    ValueError: there is no such topology.
  """
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # No chip is taken, so other processes may use libtpu too.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ImportError('the compiler for TPUs is missing; pip install libtpu') from error
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name).devices)
  except Exception as error:  # whatever libtpu raises for a name that it does not know
    if 'lockfile' in str(error):
      raise ValueError('another process uses libtpu; try again when it has ended') from error
    known = 'v4:2x2x4, v5e:4x4, v5p:4x4x4 or v6e:16x16'
    raise ValueError(
      f'--topology={name}: libtpu knows no such topology ({str(error).splitlines()[0]}); write '
      f'GENERATION:SHAPE, such as {known}'
    ) from error


def report(run: build.Experiment, found: list[Program], kind: str) -> dict[str, Any]:
  """The numbers of all programs as JSON."""
  chip, peak = CHIPS[kind], speed.peak_of(kind)
  rows = []
  for one in found:
    least = bound(one, chip, peak)
    rows.append(
      one._asdict()
      | dict(
        collectives=[c._asdict() for c in one.collectives],
        moved=one.moved,
        headroom=chip.memory - one.memory,
        roofline_seconds=least.seconds,
        limit=least.limit,
        mfu_bound=least.mfu,
        verdict=verdict(one, chip, peak),
      )
    )
  return dict(
    device=kind,
    mesh=dict(run.mesh.shape),
    replicated=replicated(run.mesh, placed_params(run.policy, run.mesh)),
    programs=rows,
  )


def lines(found: dict[str, Any]) -> list[str]:
  """The report as text."""
  gib = lambda x: f'{x / 2**30:.2f}'
  head = ('program', 'GiB', 'left', 'temporary', 'TFLOP', 'in HLO', 'GB', 'ms', 'limit', 'MFU <=')
  text = tables.table(
    head,
    [
      (r['name'], gib(r['memory']), gib(r['headroom']), gib(r['temporary']), f'{r["flops"] / 1e12:.3f}',
       f'{r["compiled_flops"] / 1e12:.3f}', f'{r["bytes"] / 1e9:.2f}',
       f'{1e3 * r["roofline_seconds"]:.2f}', r['limit'], f'{r["mfu_bound"]:.0%}')
      for r in found['programs']
    ],
  )  # fmt: skip
  rows = [
    (r['name'], c['kind'], c['axes'], c['count'], f'{c["moved"] / 1e9:.3f}')
    for r in found['programs']
    for c in r['collectives']
  ]
  text += ['', *tables.table(('program', 'collective', 'axes', 'times', 'GB a chip'), rows)]
  text.append('')
  for r in found['programs']:
    text.append(
      f'  {r["name"]}: moves {r["moved"] / 1e9:.3f} GB, the least is {r["least_moved"] / 1e9:.3f}; '
      f'{r["verdict"]} (compiled in {r["seconds"]:.0f} s)'
    )
    text += [f'    {r["error"]}'] if r['error'] else []
  whole = ', '.join(found['replicated']) or 'none'
  return [*text, f'  large parameters that every chip holds whole: {whole}']


def _placed(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['config'])
  # Programs for a topology that is not there cannot be read back from the cache.
  jax.config.update('jax_compilation_cache_dir', None)
  with cli.refusals():
    devices = topology(_TOPOLOGY.value)
    kind = devices[0].device_kind
    if kind not in CHIPS:
      raise ValueError(f'--topology={_TOPOLOGY.value}: nothing is known of a {kind}')
    config = cli.config(build.TABLE)
    if _SHAPE.value:
      if _SHAPE.value not in SHAPES:
        raise ValueError(f'--shape={_SHAPE.value}: there is {", ".join(sorted(SHAPES))}')
      settings = SHAPES[_SHAPE.value] | dict(
        max_length=131_072, dtype='bfloat16', remat='full', attention='splash'
      )
      with config.ignore_type(), config.unlocked():
        config.model = part(models.decoder, **settings)
    with sharding.compiling_for(devices):
      run = build.build(config)
    print(f'{_TOPOLOGY.value}: {len(devices)} x {kind}, mesh {dict(run.mesh.shape)}')
    if _PHASE.value and _PHASE.value not in run.order:
      raise ValueError(f'--only_phase={_PHASE.value}: the run has {", ".join(run.order)}')
    names = [_PHASE.value] if _PHASE.value else run.order
    found = [p for name in names for p in programs(name, run.phases[name], run)]
  said = report(run, found, kind)
  print('\n'.join(lines(said)))
  if cli.OUT.value:
    with open(cli.OUT.value, 'w') as file:
      json.dump(said, file, indent=2)
  sys.exit(any(r['verdict'].startswith('does not') for r in said['programs']))


if __name__ == '__main__':
  cli.run(main)
