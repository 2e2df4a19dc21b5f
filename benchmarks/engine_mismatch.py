"""Do the weights of each step arrive in vLLM, and how far are its log-probs from the trainer's?

    python -m benchmarks.engine_mismatch --python=~/vllm/bin/python --model=~/smollm2
    python -m benchmarks.engine_mismatch --model=~/smollm2    # of polgrad's own sampler with fewer bits

For each type and setting of sampling, vLLM draws rows of a model, gets other weights (noise of a tenth
of its deviation is added to each matrix), and draws again. Its log-prob of a token is compared with that
of the trainer's forward pass in float32, by the same weights and by the weights before. The command
fails if the new weights did not arrive, so that the others explain the rows better.

It writes the table in docs/engines.md. Without --python it prints the same of polgrad's own sampler, in
the types that `config.engine` knows.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import marks
from polgrad import models
from polgrad.compiling import jit
from polgrad.losses import logit_stats
from polgrad.models.token_stats import token_stats
from polgrad.sampling import engines, processors
from polgrad.sharding import to_host
from polgrad.types import Batch

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'engines.md'
PROMPTS, SAMPLES, WIDTH, NEW = 4, 2, 32, 32
# Types of polgrad's own sampler: fields of `engines.Own`.
OWN = {
  'float32': dict(dtype='float32'),
  'bfloat16': dict(dtype='bfloat16'),
  'int8 weights': dict(dtype='bfloat16', weights='int8'),
  'int8 weights and cache': dict(dtype='bfloat16', weights='int8', cache='int8'),
  'float8 weights': dict(dtype='bfloat16', weights='float8'),
  'float8 weights and cache': dict(dtype='bfloat16', weights='float8', cache='float8'),
}
NOISE = 0.1  # of a matrix, in its deviations
DTYPES = ('float32', 'bfloat16')
CASES = (
  dict(temperature=1.0, top_k=0, top_p=1.0),
  dict(temperature=0.7, top_k=0, top_p=1.0),
  dict(temperature=1.0, top_k=50, top_p=0.9),
)


class Gap(NamedTuple):
  """Differences between the log-probs of engine and trainer over the tokens of some rows, nats."""

  mean: float  # of the sizes
  largest: float
  kl: float  # k3 estimate of KL(engine || trainer), as the metric `sampler_kl`
  before: float  # mean of the sizes, by the weights before; NaN: not known
  outside: float  # fraction of the tokens that the trainer's filters leave out; not in the others
  sample_size: float  # effective, of the ratios trainer / engine; a fraction of the tokens
  seconds: float = 0.0  # of drawing the rows


def gap(batch: Batch, own: np.ndarray, before: np.ndarray | None) -> Gap:
  """The differences over the mask.

  Args:
    batch: rows of the engine.
    own: log-probs f32[B, T] of the trainer, by the weights that the engine should have.
    before: by those that it had before; None: it had none.
  """
  log_ratio = (own - batch.behavior_logp)[batch.mask]
  inside = log_ratio[np.isfinite(log_ratio)]
  far = np.array([np.nan])
  if before is not None:
    far = np.abs(before - batch.behavior_logp)[batch.mask]
    far = far[np.isfinite(far)]
  k3 = np.expm1(inside) - inside
  size, ratios = np.abs(inside), np.exp(inside)
  outside = 1 - len(inside) / len(log_ratio)
  used = ratios.sum() ** 2 / (ratios**2).sum() / len(ratios)
  return Gap(*map(float, (size.mean(), size.max(), k3.mean(), far.mean(), outside, used)))


def noisy(params, seed: int):
  """The parameters with noise on every matrix."""
  random = np.random.default_rng(seed)
  add = lambda x: x + NOISE * jnp.std(x) * random.normal(size=x.shape).astype(np.float32)
  return jax.tree.map(lambda x: add(x) if x.ndim > 1 else x, params)


def drawn_logp(logits: jax.Array, tokens: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
  """Log-probs of tokens under what top-k and top-p leave of a distribution."""
  logits = processors.top_k(logits, k=top_k) if top_k else logits
  logits = processors.top_p(logits, p=top_p) if top_p < 1 else logits
  return logit_stats.logp(logits, tokens)


@functools.cache
def trainer(policy: models.Policy, temperature: float, top_k: int, top_p: float):
  """(params, batch) -> log-probs f32[B, T] by the trainer's forward pass."""
  stat = functools.partial(drawn_logp, top_k=top_k, top_p=top_p)

  @jit
  def logp(params, tokens, segment_ids):
    hidden = policy.hidden(params, tokens, segment_ids)
    unembed = functools.partial(policy.unembed, params)
    stats = {'logp': stat}
    return token_stats(hidden, tokens, unembed, stats=stats, temperature=temperature)['logp']

  return lambda params, batch: np.asarray(logp(params, batch.tokens, batch.segment_ids))


def measure(
  engine: engines.Own | engines.External,
  policy: models.Policy,
  cases: Sequence[Mapping] = CASES,
  handed_over: int = 2,
) -> dict[str, list[Gap]]:
  """By case, the gaps after hand-overs of weights: those of the model, and others."""
  first = policy.init(jax.random.key(0))
  weights = [first, noisy(first, 1), noisy(first, 2)][:handed_over]
  tokens, mask, ids = prompts(policy.config.vocab_size)
  sizes = dict(max_new_tokens=NEW, samples_per_prompt=SAMPLES)
  found = {}
  for case in cases:
    drawn_from = {'policy': engine.drawn_from(policy)}
    sample, score = engine.sampler(drawn_from, **sizes, **case), trainer(policy, **case)
    for step, params in enumerate(weights):
      begin = time.perf_counter()
      batch = to_host(sample({'policy': params}, tokens, mask, ids, seed=0, step=step))
      seconds = time.perf_counter() - begin
      before = score(weights[step - 1], batch) if step else None
      one = gap(batch, score(params, batch), before)._replace(seconds=seconds)
      found.setdefault(name_of(case), []).append(one)
      print(engine.dtype, name_of(case), found[name_of(case)][-1], flush=True)
  print(f'{engine.dtype}: {engine.take()}', flush=True)
  return found


def name_of(case: Mapping[str, float]) -> str:
  """The case in the table."""
  return f'{case["temperature"]:g}, {case["top_k"]}, {case["top_p"]:g}'


def check(gaps: list[Gap]) -> None:
  """Refuses rows that weights of a hand-over before explain as well as those that were sent last.

  Raises:
    ValueError: the weights did not arrive.
  """
  for one in gaps[1:]:
    if one.before < 2 * one.mean:
      raise ValueError(f'the weights did not arrive: {one}')


def table(found: Mapping[str, Mapping[str, list[Gap]]]) -> str:
  """Markdown: a line for each type and case, over all hand-overs."""
  lines = [
    '| type | temperature, top-k, top-p | mean gap | largest gap | KL | outside | weights before |',
    '|---|---|---|---|---|---|---|',
  ]
  for dtype, cases in found.items():
    for name, gaps in cases.items():
      mean, kl, outside = (
        np.mean([getattr(x, k) for x in gaps]) for k in ('mean', 'kl', 'outside')
      )
      largest, before = max(x.largest for x in gaps), gaps[-1].before
      shown = f'{mean:.1e} | {largest:.1e} | {kl:.1e} | {outside:.1%} | {before:.2f}'
      lines.append(f'| {dtype} | {name} | {shown} |')
  return '\n'.join(lines)


def own_table(found: Mapping[str, list[Gap]]) -> str:
  """Markdown: a line for each type of our own sampler."""
  lines = [
    '| rollouts in | mean gap | largest gap | KL | effective sample size | time on a CPU |',
    '|---|---|---|---|---|---|',
  ]
  seconds = lambda gaps: min(x.seconds for x in gaps[1:])  # the first rollout compiles
  first = seconds(next(iter(found.values())))
  for name, gaps in found.items():
    mean, kl, used = (np.mean([getattr(x, k) for x in gaps]) for k in ('mean', 'kl', 'sample_size'))
    shown = f'{mean:.1e} | {max(x.largest for x in gaps):.1e} | {kl:.1e} | {used:.4f}'
    lines.append(f'| {name} | {shown} | {seconds(gaps) / first:.2f} |')
  return '\n'.join(lines)


def measure_own(policy: models.Policy) -> dict[str, list[Gap]]:
  """By type of our own sampler, the gaps at temperature 1."""
  found = {}
  for name, settings in OWN.items():
    [found[name]] = measure(engines.Own(**settings), policy, CASES[:1], 3).values()
    check(found[name])
    print(name, found[name], flush=True)
  return found


def prompts(vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Prompts of random tokens, their masks and their numbers."""
  random = np.random.default_rng(0)
  tokens = random.integers(1000, vocabulary, (PROMPTS, WIDTH)).astype(np.int32)
  mask = np.arange(WIDTH)[None] >= 4 * np.arange(PROMPTS)[:, None]
  return tokens, mask, np.arange(PROMPTS, dtype=np.int32)


def with_table(page: str, found: Mapping[str, Mapping[str, list[Gap]]]) -> str:
  """The page with the table in its place."""
  return marks.with_table(page, 'mismatch', table(found))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--python', help='of an environment with vLLM; none: our own sampler')
  parser.add_argument('--model', required=True, help='Hugging Face folder')
  parser.add_argument('--threads', type=int, default=2, help='of vLLM')
  parser.add_argument('--eager', action='store_true', help='do not let vLLM compile')
  arguments = parser.parse_args()
  found, policy = {}, models.pretrained(path=arguments.model, max_length=WIDTH + NEW)
  if not arguments.python:
    print(own_table(measure_own(policy)))
    return
  for dtype in DTYPES:
    sizes = dict(cache_gib=1, rows=32, variables={'OMP_NUM_THREADS': arguments.threads})
    engine = engines.Vllm(python=arguments.python, dtype=dtype, eager=arguments.eager, **sizes)
    engine.check_installed('--python')
    found[dtype] = measure(engine, policy)
    engine.served.stop()
    for gaps in found[dtype].values():
      check(gaps)
  PAGE.write_text(with_table(PAGE.read_text(), found))
  print(table(found))


if __name__ == '__main__':
  main()
