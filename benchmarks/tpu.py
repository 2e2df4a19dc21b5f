"""Compiles updates for a TPU topology, without a TPU; bytes are the compiler's own count.

    pip install libtpu
    TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu [--topology=v5e:2x4]

A supervised update with AdamW of a Qwen3 of 0.6B parameters on rows of 4,096 tokens, float32 parameters
and bfloat16 activations, every layer recomputed, cut over fsdp x tensor, with every attention that
runs on TPUs. The floor is counted by hand: gradients, the inputs of all layers, the unembedding whole
but for its cut over tensor, and the logits of a chunk of tokens with their derivative. Nothing runs,
so no speed is measured.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polgrad import learner, methods, models, optim, phases, sharding
from polgrad.models.token_stats import LOGITS
from polgrad.types import Batch, TrainState

QWEN = dict(
  vocab_size=151_936, num_layers=28, width=1024, num_heads=16, num_kv_heads=8, head_dim=128,
  mlp_width=3072, qk_norm='head', rope_theta=1e6, max_length=4096, dtype='bfloat16', remat='full',
)  # fmt: skip
ROWS, LENGTH = 8, 4096
MODELS = {
  'einsum': {},
  'splash': {'attention': 'splash'},
  'splash, Gemma': dict(
    attention='splash', attention_softcap=50.0, window=512, local_layers=tuple(range(0, 28, 2))
  ),
}


def placed(x, where):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def compile_update(mesh: Mesh, **settings):
  """The compiled update, and the bytes of its floor on a device."""
  policy = models.decoder(**QWEN, **settings)
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
    jax.ShapeDtypeStruct((ROWS, LENGTH), dtype), sharding.batch_sharding(mesh, 2)
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
  tokens = ROWS // sharding.data_parallel_size(mesh) * LENGTH
  inputs = QWEN['num_layers'] * tokens * QWEN['width'] * 2
  head = (QWEN['vocab_size'] * QWEN['width'] * 2 + 2 * 4 * LOGITS) / mesh.shape['tensor']
  return compiled, sum(map(local, jax.tree.leaves(params))) + inputs + head


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='v5e:2x4')
  name = parser.parse_args().topology
  devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  with sharding.compiling_for(devices):
    mesh = sharding.make_mesh(fsdp=len(devices) // 2, tensor=2)
  for kind, settings in MODELS.items():
    start = time.perf_counter()
    compiled, floor = compile_update(mesh, **settings)
    seconds = time.perf_counter() - start
    held = compiled.memory_analysis().temp_size_in_bytes
    print(
      f'{name} {kind:14} temporary {held / 2**30:.2f} GiB a device, floor {floor / 2**30:.2f} GiB '
      f'({held / floor:.2f}); compiled in {seconds:.0f} s',
      flush=True,
    )


if __name__ == '__main__':
  main()
