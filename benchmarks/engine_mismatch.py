"""Do the weights of each step arrive in vLLM, and how far are its log-probs from the trainer's?

    python -m benchmarks.engine_mismatch --python=~/vllm/bin/python --model=~/smollm2

For each type and setting of sampling, vLLM draws rows of a model, gets other weights (noise of a tenth
of its deviation is added to each matrix), and draws again. Its log-prob of a token is compared with that
of the trainer's forward pass in float32, by the same weights and by the weights before. The command
fails if the new weights did not arrive, so that the others explain the rows better. It writes the
table in docs/engines.md.
"""

import argparse
import functools
import pathlib
from collections.abc import Mapping
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
from polgrad.types import Batch

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'engines.md'
PROMPTS, SAMPLES, WIDTH, NEW = 4, 2, 32, 32
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
  size = np.abs(inside)
  numbers = size.mean(), size.max(), k3.mean(), far.mean(), 1 - len(inside) / len(log_ratio)
  return Gap(*map(float, numbers))


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


def measure(engine: engines.External, policy: models.Policy) -> dict[str, list[Gap]]:
  """By case, the gaps after two hand-overs of weights: those of the model, and others."""
  first = policy.init(jax.random.key(0))
  weights = [first, noisy(first, 1)]
  random = np.random.default_rng(0)
  tokens = random.integers(1000, policy.config.vocab_size, (PROMPTS, WIDTH)).astype(np.int32)
  mask = np.arange(WIDTH)[None] >= 4 * np.arange(PROMPTS)[:, None]
  ids = np.arange(PROMPTS, dtype=np.int32)
  sizes = dict(max_new_tokens=NEW, samples_per_prompt=SAMPLES)
  found = {}
  for case in CASES:
    sample, score = engine.sampler({'policy': policy}, **sizes, **case), trainer(policy, **case)
    for step, params in enumerate(weights):
      batch = sample({'policy': params}, tokens, mask, ids, seed=0, step=step)
      before = score(weights[step - 1], batch) if step else None
      found.setdefault(name_of(case), []).append(gap(batch, score(params, batch), before))
      print(engine.dtype, name_of(case), found[name_of(case)][-1], flush=True)
  cost = engine.take()
  print(f'{engine.dtype}: {cost}', flush=True)
  engine.served.stop()
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
    if one.before < 10 * one.mean:
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


def with_table(page: str, found: Mapping[str, Mapping[str, list[Gap]]]) -> str:
  """The page with the table in its place."""
  return marks.with_table(page, 'mismatch', table(found))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--python', required=True, help='of an environment with vLLM')
  parser.add_argument('--model', required=True, help='Hugging Face folder')
  parser.add_argument('--threads', type=int, default=2, help='of vLLM')
  parser.add_argument('--eager', action='store_true', help='do not let vLLM compile')
  arguments = parser.parse_args()
  found, policy = {}, models.pretrained(path=arguments.model, max_length=WIDTH + NEW)
  for dtype in DTYPES:
    sizes = dict(cache_gib=1, rows=32, variables={'OMP_NUM_THREADS': arguments.threads})
    engine = engines.Vllm(python=arguments.python, dtype=dtype, eager=arguments.eager, **sizes)
    engine.check_installed('--python')
    found[dtype] = measure(engine, policy)
    for gaps in found[dtype].values():
      check(gaps)
  PAGE.write_text(with_table(PAGE.read_text(), found))
  print(table(found))


if __name__ == '__main__':
  main()
