"""Compiles updates for a TPU topology, without a TPU; bytes are the compiler's own count.

    pip install 'jax[tpu]'
    TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu [--topology=v5e:2x4] [--only=long]

A supervised update with AdamW of a Qwen3 of 0.6B parameters, with float32 parameters and bfloat16
activations, every layer recomputed. Rows of 4,096 tokens are cut over fsdp x tensor, with every
attention that runs on TPUs; long rows of 32,768 tokens are cut along their positions too, with inputs of
layers on the chip or in the memory of the host. The floor is counted by hand: gradients, the inputs of
all layers, the unembedding whole but for its cut over tensor, and the logits of a chunk of tokens with
their derivative. Nothing runs, so no speed is measured.
"""

import argparse
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polgrad import hlo, learner, methods, models, optim, phases, sharding
from polgrad.models.token_stats import LOGITS
from polgrad.types import Batch, TrainState

QWEN = dict(
  vocab_size=151_936, num_layers=28, width=1024, num_heads=16, num_kv_heads=8, head_dim=128,
  mlp_width=3072, qk_norm='head', rope_theta=1e6, max_length=32_768, dtype='bfloat16', remat='full',
)  # fmt: skip

TENSOR = dict(tensor=2)


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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='v5e:2x4')
  parser.add_argument('--only', default='', help='cases whose names begin with this')
  options = parser.parse_args()
  name = options.topology
  devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  for kind in filter(lambda kind: kind.startswith(options.only), CASES):
    case = CASES[kind]
    with sharding.compiling_for(devices):
      fsdp = len(devices) // math.prod(case.mesh.values())
      mesh = sharding.make_mesh(fsdp=fsdp, **case.mesh)
    start = time.perf_counter()
    compiled, floor = compile_update(mesh, case)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes
    exchanged = sum(
      one.moved
      for one in hlo.collectives(compiled.as_text(), dict(mesh.shape))
      if one.kind == 'all-to-all'
    )
    print(
      f'{name} {kind:14} temporary {held / 2**30:.2f} GiB a device, floor {floor / 2**30:.2f} GiB '
      f'({held / floor:.2f}), on the host {memory.host_temp_size_in_bytes / 2**30:.2f} GiB, '
      f'all-to-all {exchanged / 1e9:.2f} GB; compiled in {seconds:.0f} s',
      flush=True,
    )


if __name__ == '__main__':
  main()
