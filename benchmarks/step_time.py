"""Where the time of a reinforcement step goes, and what the loss head holds in memory.

    python benchmarks/step_time.py [--prompts=64] [--repeats=15]

Times are medians over repeats of one process, with their quartiles; machines are noisy, so compare
ratios within one run. Memory is the compiler's own count of temporary bytes, which is exact.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import quickstart
from polgrad import learner, sharding, train
from polgrad.build import build
from polgrad.compiling import jit
from polgrad.models.token_stats import STATS, token_stats

_PROMPTS = flags.DEFINE_integer('prompts', 64, 'Prompts a rollout, of 8 samples each.')
_REPEATS = flags.DEFINE_integer('repeats', 15, 'Timed repetitions.')


def timed(function) -> tuple[float, float, float]:
  """Quartiles of the seconds of a call, after one that is not counted."""
  jax.block_until_ready(function())
  seconds = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - start)
  return tuple(statistics.quantiles(seconds, n=4))


def step_times() -> dict[str, tuple[float, float, float]]:
  """Collecting (sample, score, credit) and one update on all rows, on the quickstart's model."""
  config = quickstart.get_config()
  config.phases.grpo.collect.update(prompts=_PROMPTS.value, max_resamples=0)
  config.phases.grpo.minibatches = 1
  config.mesh.data = 1
  experiment = build(config)
  phase = experiment.phases['grpo']
  with jax.set_mesh(experiment.mesh):
    state = train.begin(experiment, 1, None)
    collect = phase.collect.make(train.context(experiment, phase, 1))
    draw = lambda: train.Drawer(phase, seed=0, cursor=0)
    batch = sharding.place_batch(experiment.mesh, collect(state, draw(), 0).batch)
    update = jit(
      learner.make_update(
        experiment.policy,
        phase.objective,
        phase.optimizer,
        temperature=phase.collect.temperature,
      )
    )
    return {
      'collect': timed(lambda: collect(state, draw(), 0).batch.tokens),
      'update': timed(lambda: update(state, batch)[1]['loss']),
    }


def head_bytes(vocabulary: int = 49_152, tokens: int = 2048, width: int = 576) -> dict[str, int]:
  """Temporary bytes of value and gradient of the loss head, chunked and with all logits at once."""
  shapes = (
    jax.ShapeDtypeStruct((8, tokens // 8, width), jnp.float32),
    jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
    jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32),
  )

  def loss(hidden, weight, ids, chunk):
    found = token_stats(hidden, ids, lambda h: h @ weight.T, stats=STATS, chunk=chunk)
    return jnp.sum(found['logp']) + jnp.sum(found['entropy'])

  def measure(chunk):
    compiled = jit(jax.grad(lambda *x: loss(*x, chunk), (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  return {'chunks of 512 tokens': measure(512), 'all logits': measure(10 * tokens)}


def main(_) -> None:
  for name, (low, middle, high) in step_times().items():
    print(f'{name:24} {1e3 * middle:8.1f} ms  (quartiles {1e3 * low:.1f}, {1e3 * high:.1f})')
  for name, size in head_bytes().items():
    print(f'{name:24} {size / 2**20:8.1f} MiB of temporaries')


if __name__ == '__main__':
  app.run(main)
