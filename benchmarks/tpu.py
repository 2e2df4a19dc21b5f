"""Compiles updates for a TPU topology, without a TPU; bytes are the compiler's.

    pip install libtpu
    TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu [--topology=v5e:2x4]

An update of a Qwen3 of 0.6B parameters on rows of 4,096 tokens, cut over fsdp x tensor, with every
kind of attention that a TPU can have. Nothing runs, so no speed is measured.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from polgrad import learner, models, sharding

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


def update_for(mesh: Mesh, **settings):
  """The compiled gradient of a supervised loss on the mesh."""
  policy = models.decoder(**QWEN, **settings)
  shapes = policy.shapes()
  placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  params = jax.tree.map(placed, shapes, sharding.param_shardings(mesh, policy.axes(shapes), shapes))
  rows = placed(jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), sharding.batch_sharding(mesh, 2))

  def loss(params, tokens, segment_ids):
    return -jnp.mean(learner.forward(policy, params, tokens, segment_ids).logp)

  with jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss)).lower(params, rows, rows).compile()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='v5e:2x4')
  name = parser.parse_args().topology
  devices = np.array(topologies.get_topology_desc(platform='tpu', topology_name=name).devices)
  mesh = Mesh(
    devices.reshape(1, -1, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3
  )
  for kind, settings in MODELS.items():
    start = time.perf_counter()
    memory = update_for(mesh, **settings).memory_analysis()
    print(
      f'{name} {kind:14} temporary {memory.temp_size_in_bytes / 2**30:.2f} GiB a device, '
      f'compiled in {time.perf_counter() - start:.0f} s',
      flush=True,
    )


if __name__ == '__main__':
  main()
