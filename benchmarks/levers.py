"""What shared prompts, packed rows and slots bring, against the same work without them, in one run.

    python -m benchmarks.levers [--repeats=7]

The model is a random Qwen3 of four layers and width 256 in float32. Both variants of a pair run in
turn; a ratio is of two neighbours. Before anything is timed their results are compared.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import MODEL
from polgrad import compiling, learner, models
from polgrad.compiling import jit
from polgrad.packing import pack
from polgrad.sampling import make_sampler
from polgrad.types import Batch, Layout, Params

POLICY = models.decoder(**{**MODEL, 'max_length': 1024})
GROUP = 8
STOP = 1


@functools.cache
def parameters() -> Params:
  """Random ones, made when they are first asked for: after `compiling.prepare`."""
  return POLICY.init(jax.random.key(0))


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


def rows(prompt: int, lengths: np.ndarray, longest: int) -> Batch:
  """Groups of eight completions of these lengths after their prompts."""
  random = np.random.default_rng(0)
  heads = np.repeat(random.integers(2, 1024, (len(lengths) // GROUP, prompt)), GROUP, axis=0)
  tails = random.integers(2, 1024, (len(lengths), longest))
  seen = np.arange(prompt + longest)[None] < prompt + lengths[:, None]
  return Batch(
    tokens=np.concatenate([heads, tails], axis=1).astype(np.int32),
    segment_ids=seen.astype(np.int32),
    mask=seen & (np.arange(prompt + longest) >= prompt),
  )


def gradients(plain: Batch, fast: Batch, repeats: int) -> str:
  """The gradient of an update's log-probs; the two batches differ in their layout alone."""

  @jit
  @jax.value_and_grad
  def loss(params, batch):
    logp = learner.forward(POLICY, params, batch).logp
    return jnp.sum(jnp.where(batch.mask, logp, 0)) / jnp.sum(batch.mask)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    loss(parameters(), plain),
    loss(parameters(), fast),
  )
  return in_turn(lambda: loss(parameters(), plain), lambda: loss(parameters(), fast), repeats)


def shared_prompts(prompt: int, completion: int, prompts: int, repeats: int) -> str:
  """Every prompt forwarded eight times, or once."""
  batch = rows(prompt, np.full(prompts * GROUP, completion), completion)
  return gradients(batch, batch.replace(layout=Layout(prompt, GROUP)), repeats)


def packed_rows(prompt: int, lengths: np.ndarray, longest: int, repeats: int) -> str:
  """Every completion in a row of its own, or several in one."""
  batch = rows(prompt, np.minimum(lengths, longest), longest).replace(layout=Layout(prompt))
  packed = pack(batch.replace(layout=Layout(prompt, pack=8)))
  told = gradients(batch, packed, repeats)
  return f'{told}   {packed.layout.rows or len(lengths)} of {len(lengths)} rows'


def ending(policy):
  """Ends with probability 1/64 at every token, so lengths are geometric with mean 64."""
  others = policy.at[:, STOP].set(-jnp.inf)
  return others.at[:, STOP].set(jax.nn.logsumexp(others, axis=-1) - jnp.log(63.0))


def slots(rows: int, at_once: int, longest: int, repeats: int) -> str:
  """Rows of geometric lengths: batches of `at_once` rows in turn, or as many slots and a queue."""
  settings = dict(role=ending, max_new_tokens=longest, samples_per_prompt=GROUP, stop_ids=(STOP,))
  static = make_sampler({'policy': POLICY}, **settings)
  queued = make_sampler({'policy': POLICY}, slots=at_once, **settings)
  prompts = np.random.default_rng(1).integers(2, 1024, (rows // GROUP, 32)).astype(np.int32)
  ids, step = np.arange(len(prompts)), at_once // GROUP
  call = lambda sample, s: sample(
    {'policy': parameters()}, prompts[s], np.ones_like(prompts[s], bool), ids[s], seed=0, step=0
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
  random = np.random.default_rng(0)
  for prompt, longest, lengths in (
    (32, 512, random.geometric(1 / 64, 64)),
    (32, 256, random.integers(1, 256, 64, endpoint=True)),
    (32, 96, random.integers(1, 96, 64, endpoint=True)),
    (256, 128, random.geometric(1 / 48, 32)),
    (32, 96, random.integers(64, 96, 64, endpoint=True)),
  ):
    told = packed_rows(prompt, lengths, longest, repeats)
    print(
      f'gradient, prompt {prompt:3}, completions of mean {np.minimum(lengths, longest).mean():3.0f}, '
      f'at most {longest}: {told}',
      flush=True,
    )
  print(f'rollout, 256 rows, 32 at a time: {slots(256, 32, 512, max(2, repeats // 3))}', flush=True)


if __name__ == '__main__':
  compiling.prepare()
  compiling.in_one_chunk(main)()
