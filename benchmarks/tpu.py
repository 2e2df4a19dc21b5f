"""Compiles updates and decoding for a TPU topology, without a TPU; bytes are the compiler's own count.

    pip install 'jax[tpu]'
    TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu [--topology=v5e:2x4] [--only=long]
    TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu --decode [--topology=v5e:2x2] [--only=int8]

A supervised update with AdamW of a Qwen3 of 0.6B parameters, with float32 parameters and bfloat16
activations, every layer recomputed. Rows of 4,096 tokens are cut over fsdp x tensor, with every
attention that runs on TPUs; long rows of 32,768 tokens are cut along their positions too, with inputs of
layers on the chip or in the memory of the host. The floor is counted by hand: gradients, the inputs of
all layers, the unembedding whole but for its cut over tensor, and the logits of a chunk of tokens with
their derivative. Nothing runs, so no speed is measured.

With --decode it compiles the loop of decoding for one chip, with a few layers of the same model, in the
types that `config.engine` knows. It counts what a step reads of main memory in the text of the program,
and writes a table in docs/engines.md.
"""

import argparse
import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import marks
from benchmarks.engine_mismatch import OWN, PAGE
from polgrad import aot, hlo, learner, methods, models, optim, phases, sharding
from polgrad.checks import memory
from polgrad.models.token_stats import LOGITS
from polgrad.sampling import behavior_policies, decoding, engines, processors, sampler
from polgrad.types import Batch, TrainState

QWEN = dict(
  vocab_size=151_936, num_layers=28, width=1024, num_heads=16, num_kv_heads=8, head_dim=128,
  mlp_width=3072, qk_norm='head', rope_theta=1e6, max_length=32_768, dtype='bfloat16', remat='full',
)  # fmt: skip

TENSOR = dict(tensor=2)
LAYERS = 4  # of the loop of decoding
LARGE = 2**23  # bytes of the least array whose copies are counted: smaller than a span of the cache


class Case(NamedTuple):
  """One update."""

  settings: dict  # of the model
  mesh: dict  # sizes of axes; fsdp has what they leave
  rows: int = 8
  length: int = 4096


CASES = {
  'einsum': Case({}, TENSOR),
  'splash': Case({'attention': 'splash'}, TENSOR),
  'splash, Gemma': Case(
    dict(
      attention='splash', attention_softcap=50.0, window=512, local_layers=tuple(range(0, 28, 2))
    ),
    TENSOR,
  ),
  'long': Case(dict(attention='splash'), dict(context=4), rows=2, length=32_768),
  'long, offload': Case(
    dict(attention='splash', remat='offload'), dict(context=4), rows=2, length=32_768
  ),
}


def placed(x, where):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def compile_update(mesh: Mesh, case: Case):
  """The compiled update, and the bytes of its floor on a device."""
  policy = models.decoder(**QWEN | case.settings)
  objective = methods.sft().bound()[1]
  optimizer = optim.adamw(learning_rate=1e-5)
  shapes = policy.shapes()
  where = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
  params = jax.tree.map(placed, shapes, where)
  whole = lambda x: placed(x, NamedSharding(mesh, PartitionSpec()))
  number = whole(jax.ShapeDtypeStruct((), jnp.int32))
  state = TrainState(
    **dict.fromkeys(('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped'), number),
    params=params,
    opt_state=jax.tree.map(
      placed,
      jax.eval_shape(optimizer.init, params),
      phases.opt_shardings(optimizer, mesh, params),
    ),
    anchors={},
    collect_state=(),
    credit_state=(),
    objective_state=jax.tree.map(whole, jax.eval_shape(objective.init)),
  )
  rows = lambda dtype: placed(
    jax.ShapeDtypeStruct((case.rows, case.length), dtype), sharding.batch_sharding(mesh, 2)
  )
  batch = Batch(tokens=rows(jnp.int32), segment_ids=rows(jnp.int32), mask=rows(bool))
  update = jax.jit(
    learner.Learner(policy, objective, optimizer).update,
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
  )
  with jax.set_mesh(mesh):
    compiled = update.lower(state, batch).compile()
  local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  tokens = case.rows * case.length // sharding.data_parallel_size(mesh) // mesh.shape['context']
  inputs = QWEN['num_layers'] * tokens * QWEN['width'] * 2
  inputs *= policy.config.remat != 'offload'
  head = (QWEN['vocab_size'] * QWEN['width'] * 2 + 2 * 4 * LOGITS) / mesh.shape['tensor']
  return compiled, sum(map(local, jax.tree.leaves(params))) + inputs + head


class Decoding(NamedTuple):
  """A compiled loop of decoding, on one device."""

  text: str  # the program
  weights: float  # bytes that a step must read
  cache: float  # bytes, of all columns
  accessed: (
    float  # bytes that a step accesses by XLA's analysis, in main memory and near the processor
  )


def compile_decoding(
  policy: models.Policy, mesh: Mesh, *, rows: int, prompt: int, new: int
) -> Decoding:
  """The loop of decoding that the sampler of one turn runs between two refills."""
  one = sampler.configure(
    decoding.Sampler,
    {},
    mesh,
    default=policy,
    behavior_policy=behavior_policies.current,
    max_new_tokens=new,
    samples_per_prompt=1,
    slots=0,
    stop_ids=(0,),
    pad_id=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    token_temperature=processors.unchanged,
  )
  weights = {'policy': memory.unstacked(policy, mesh)}
  shape = lambda dtype, *sizes: aot.by_rows(mesh, jax.ShapeDtypeStruct(sizes, dtype))
  prompts = shape(jnp.int32, rows, prompt), shape(jnp.bool_, rows, prompt)

  def begin(weights, tokens, mask):
    read = one.prefill(weights, tokens, mask)
    return one.refill(read, one.start(read, prompt))

  with jax.set_mesh(mesh):
    state = jax.eval_shape(begin, weights, *prompts)
  state = jax.tree.map(functools.partial(aot.by_rows, mesh), state)
  numbers = lambda ids: one.row_keys(jnp.int32(0), jnp.int32(0), ids)
  keys = jax.eval_shape(numbers, shape(jnp.int32, rows))

  def loop(weights, keys, state):
    draw = functools.partial(one.draw, weights, keys, None, prompt)
    return jax.lax.while_loop(decoding.no_refill_due, draw, state)

  with jax.set_mesh(mesh):
    compiled = jax.jit(loop, donate_argnums=2).lower(weights, keys, state).compile()
  accessed = compiled.cost_analysis()['bytes accessed']
  return Decoding(compiled.as_text(), aot.local(weights), aot.local(state.caches), accessed)


def decode_table(topology: str, only: str) -> str:
  """Markdown: a line for each type of rollouts."""
  with sharding.compiling_for(aot.topology(topology)[:1]):
    mesh = sharding.make_mesh()
  lines = [
    '| rollouts in | weights, MB | cache, MB | a step reads, MB | of both | writes, MB | copies |',
    '|---|---|---|---|---|---|---|',
  ]
  model = models.decoder(**QWEN | dict(num_layers=LAYERS, remat='none'))
  for name, settings in OWN.items():
    if only not in name:
      continue
    policy = engines.Own(**settings).drawn_from(model)
    made = compile_decoding(policy, mesh, rows=32, prompt=1024, new=1024)
    found = hlo.main_memory(made.text, large=LARGE)
    least = made.weights + made.cache
    sizes = [f'{x / 1e6:.0f}' for x in (made.weights, made.cache, found.read)]
    rest = f'{found.read / least:.2f} | {found.written / 1e6:.0f} | {len(found.copied)}'
    lines.append(f'| {name} | {" | ".join(sizes)} | {rest} |')
    print(lines[-1], f'XLA: {made.accessed / 1e6:.0f} MB', found.copied, flush=True)
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--decode', action='store_true', help='decoding in place of updates')
  parser.add_argument('--topology', default='v5e:2x4')
  parser.add_argument('--only', default='', help='cases whose names begin with this')
  options = parser.parse_args()
  name = options.topology
  if options.decode:
    table = decode_table(name, options.only)
    if not options.only:
      PAGE.write_text(marks.with_table(PAGE.read_text(), 'decode', table))
    return
  devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  for kind in filter(lambda kind: kind.startswith(options.only), CASES):
    case = CASES[kind]
    with sharding.compiling_for(devices):
      fsdp = len(devices) // math.prod(case.mesh.values())
      mesh = sharding.make_mesh(fsdp=fsdp, **case.mesh)
    start = time.perf_counter()
    compiled, floor = compile_update(mesh, case)
    seconds = time.perf_counter() - start
    held = compiled.memory_analysis()
    temporary = held.temp_size_in_bytes
    exchanged = sum(
      one.moved
      for one in hlo.collectives(compiled.as_text(), dict(mesh.shape))
      if one.kind == 'all-to-all'
    )
    print(
      f'{name} {kind:14} temporary {temporary / 2**30:.2f} GiB a device, floor {floor / 2**30:.2f} GiB '
      f'({temporary / floor:.2f}), on the host {held.host_temp_size_in_bytes / 2**30:.2f} GiB, '
      f'all-to-all {exchanged / 1e9:.2f} GB; compiled in {seconds:.0f} s',
      flush=True,
    )


if __name__ == '__main__':
  main()
