"""What shared prompts and slots bring, against the same work without them, in one run.

    python -m benchmarks.levers [--repeats=7]

The model is a random Qwen3 of four layers and width 256 in float32. Both variants of a pair run in
turn; a ratio is of two neighbours. Before anything is timed their results are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import MODEL
from polgrad import learner, models
from polgrad.compiling import jit
from polgrad.sampling import make_sampler
from polgrad.types import Layout

POLICY = models.decoder(**{**MODEL, 'max_length': 1024})
PARAMS = POLICY.init(jax.random.key(0))
GROUP = 8
STOP = 1


def in_turn(plain: Callable, fast: Callable, repeats: int) -> str:
  """Median seconds of both, and the ratio of neighbours: median (least to largest)."""
  seconds = []
  for _ in range(repeats + 1):
    row = []
    for run in (plain, fast):
      start = time.perf_counter()
      jax.block_until_ready(run())
      row.append(time.perf_counter() - start)
    seconds.append(row)
  a, b = (statistics.median(x) for x in zip(*seconds[1:]))
  ratios = [x / y for x, y in seconds[1:]]
  middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
  return f'{a:7.3f} s -> {b:7.3f} s   {middle:.2f}x ({low:.2f} to {high:.2f})'


def shared_prompts(prompt: int, completion: int, prompts: int, repeats: int) -> str:
  """The gradient of an update's log-probs, every prompt forwarded eight times or once."""
  random = np.random.default_rng(0)
  heads = np.repeat(random.integers(2, 1024, (prompts, prompt)), GROUP, axis=0)
  tails = random.integers(2, 1024, (prompts * GROUP, completion))
  tokens = jnp.asarray(np.concatenate([heads, tails], axis=1), jnp.int32)
  mask = jnp.arange(prompt + completion) >= prompt

  def make(layout):
    def loss(params):
      out = learner.forward(POLICY, params, tokens, jnp.ones_like(tokens), layout=layout)
      return jnp.sum(jnp.where(mask[None], out.logp, 0)) / tails.size

    return jit(jax.value_and_grad(loss))

  plain, shared = make(Layout()), make(Layout(prompt, GROUP))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    plain(PARAMS),
    shared(PARAMS),
  )
  return in_turn(lambda: plain(PARAMS), lambda: shared(PARAMS), repeats)


def ending(policy):
  """Ends with probability 1/64 at every token, so lengths are geometric with mean 64."""
  others = policy.at[:, STOP].set(-jnp.inf)
  return others.at[:, STOP].set(jax.nn.logsumexp(others, axis=-1) - jnp.log(63.0))


def slots(rows: int, at_once: int, longest: int, repeats: int) -> str:
  """Rows of geometric lengths: batches of `at_once` rows in turn, or as many slots and a queue."""
  settings = dict(role=ending, max_new_tokens=longest, group_size=GROUP, stop_ids=(STOP,))
  static = make_sampler({'policy': POLICY}, **settings)
  queued = make_sampler({'policy': POLICY}, slots=at_once, **settings)
  prompts = np.random.default_rng(1).integers(2, 1024, (rows // GROUP, 32)).astype(np.int32)
  ids, step = np.arange(len(prompts)), at_once // GROUP
  call = lambda sample, s: sample(
    {'policy': PARAMS}, prompts[s], np.ones_like(prompts[s], bool), ids[s], seed=0, step=0
  )
  cuts = [slice(i, i + step) for i in range(0, len(prompts), step)]
  plain = lambda: [call(static, s) for s in cuts]
  fast = lambda: call(queued, slice(None))
  one = fast()
  for i, batch in enumerate(plain()):
    same = slice(i * at_once, (i + 1) * at_once)
    np.testing.assert_array_equal(batch.tokens, one.tokens[same])
    np.testing.assert_allclose(batch.behavior_logp, one.behavior_logp[same], atol=1e-4)
  lengths = np.asarray(one.mask.sum(axis=1))
  told = in_turn(plain, fast, repeats)
  return f'{told}   lengths: mean {lengths.mean():.0f}, max {lengths.max()}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=7)
  repeats = parser.parse_args().repeats
  for prompt, completion, prompts in ((512, 128, 1), (256, 128, 1), (128, 128, 2), (32, 64, 8)):
    told = shared_prompts(prompt, completion, prompts, repeats)
    print(
      f'gradient, prompt {prompt:3}, completion {completion:3}, {GROUP} a prompt: {told}',
      flush=True,
    )
  print(f'rollout, 256 rows, 32 at a time: {slots(256, 32, 512, max(2, repeats // 3))}', flush=True)


if __name__ == '__main__':
  main()
