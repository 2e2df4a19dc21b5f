"""Speculative decoding of a real model: how many tokens a pass gives, and what it saves.

    python -m benchmarks.speculation --model=~/smollm2 [--rows=4] [--new=64] [--repeats=3]

Rows are drawn with proposals and without them, in turn. The rows are equal, except for those in which a
rounding of logits has changed a token; their fraction is in the table. Costs are CPU seconds of one
process, and a speed-up is the median of ratios of neighbours. `copy` asks for a text again, `sums` for
sums after worked ones.

The second table is of proposals by the first layers, in the places of the rows that were drawn at
temperature 1: the mean probability that a proposal is drawn. By common noise it is

    sum_i 1 / sum_j max(p_j / p_i, q_j / q_i),

and at least (1 - TV) / (1 + TV), with rejection sampling 1 - TV, where TV is the total variation
distance of both. The command writes the tables of docs/sampling.md.
"""

import argparse
import functools
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import marks
from polgrad import models
from polgrad.data.tokenizers import huggingface
from polgrad.models.first_layers import first_layers
from polgrad.sampling import make_sampler
from polgrad.sampling.sampler import behavior_at
from polgrad.sampling.speculation import FirstLayers, NGram, Proposer
from polgrad.types import Batch

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'sampling.md'
TEXT = (
  'The committee met on Tuesday to discuss the new library. Mrs. Alvarez asked for longer hours, '
  'and Mr. Brandt reported that the roof over the reading room had been repaired in March.'
)
WORKS = {
  'copy': f'Text: {TEXT}\nThe same text again: The committee met',
  'sums': (
    'Question: 12 plus 30 minus 5? Work: 12 + 30 = 42, 42 - 5 = 37. Answer: 37\n'
    'Question: 44 plus 18 minus 9? Work: 44 + 18 = 62, 62 - 9 = 53. Answer: 53\n'
    'Question: 71 plus 16 minus 3? Work: 71 + 16 = 87, 87 - 3 = 84. Answer: 84\n'
    'Question: 25 plus 13 minus 6? Work:'
  ),
}


def cases(layers: int) -> list[tuple[float, str, Proposer]]:
  """Temperature, name and proposer of the lines of the table; `layers` are those of the model."""
  part = -(-layers * 5 // 6)
  return [
    (0.0, 'n-gram, 4', NGram(tokens=4)),
    (1.0, 'n-gram, 4', NGram(tokens=4)),
    (1.0, f'{part} of {layers} layers, 2', FirstLayers(tokens=2, layers=part)),
  ]


def compared(plain: Callable[[int], Batch], fast: Callable[[int], Batch], repeats: int) -> str:
  """A line of the table: tokens of a pass, the ratio of costs, and rows that differ."""
  ratios, tokens, passes, differ = [], 0, 0, []
  for step in range(repeats + 1):  # the first one compiles
    pair = {}
    for run in (plain, fast) if step % 2 else (fast, plain):
      start = time.process_time()
      batch = jax.device_get(run(step))
      pair[run] = batch, time.process_time() - start
    (expected, slow), (found, quick) = pair[plain], pair[fast]
    if step:
      ratios.append(slow / quick)
      tokens, passes = tokens + found.mask.sum(), passes + found['passes'].sum()
      differ.append(np.mean((expected.tokens != found.tokens).any(axis=1)))
  spread = f'{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})'
  return f'{tokens / passes:.2f} | {spread} | {np.mean(differ):.0%}'


def agreement(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
  """(with common noise, with rejection sampling): how often a draw of q is kept, for one place.

  Args:
    p, q: probabilities f64[V].
  """
  order = np.argsort(p / np.maximum(q, 1e-300))
  p, q = p[order], q[order]
  # sum_j max(p_j / p_i, q_j / q_i): of the tokens j behind i, p_j / p_i is the larger one.
  behind = np.cumsum(p[::-1])[::-1] - p
  before = np.cumsum(q)
  with np.errstate(divide='ignore', invalid='ignore'):
    each = 1 / (behind / p + before / q)
  return float(np.nansum(np.where((p > 0) & (q > 0), each, 0))), float(np.minimum(p, q).sum())


def accepted(
  policy: models.Policy, params, batch: Batch, layers: int
) -> tuple[float, float, float]:
  """Means over the drawn tokens, for proposals by the first layers.

  Returns:
    How often a proposal is kept: with common noise, at least with it, with rejection sampling.
  """
  flat = policy.unstack(params)
  real = batch.segment_ids > 0
  positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)

  @jax.jit
  def probabilities(flat):
    found = []
    for model in (policy, first_layers(policy, layers)):
      cache = policy.init_cache(*batch.tokens.shape)
      hidden, _ = model.decode(flat, batch.tokens, positions, real, cache, 0)
      found.append(jax.nn.softmax(policy.unembed(flat, hidden)))
    return found

  both = [np.asarray(x, np.float64)[:, :-1][batch.mask[:, 1:]] for x in probabilities(flat)]
  pairs = np.array([agreement(p, q) for p, q in zip(*both)])
  least = pairs[:, 1] / (2 - pairs[:, 1])
  return float(pairs[:, 0].mean()), float(least.mean()), float(pairs[:, 1].mean())


def sampler(
  policy: models.Policy, params, prompts: dict, temperature: float, **settings
) -> Callable:
  """(work, step) -> rows of its prompt."""
  behavior, heat = behavior_at(temperature)
  sample = make_sampler({'policy': policy}, temperature=heat, behavior_policy=behavior, **settings)
  return lambda work, step: sample(
    {'policy': params}, *prompts[work], np.arange(1), seed=0, step=step
  )


def laid_out(encode: Callable[[str], list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Tokens and mask of each prompt, of one width."""
  ids = {work: encode(text) for work, text in WORKS.items()}
  width = max(map(len, ids.values()))
  pad = lambda x: (np.array([[0] * (width - len(x)) + x]), np.arange(width)[None] >= width - len(x))
  return {work: pad(x) for work, x in ids.items()}


def write(speed: list[str], shares: list[str]) -> None:
  """Writes both tables into the page."""
  head = '| work | temperature | proposer, tokens | tokens a pass | speed-up | rows that differ |'
  table = '\n'.join([head, '|---' * 6 + '|', *speed])
  page = marks.with_table(PAGE.read_text(), 'speculation', table)
  head = '| work | layers | common noise | its least | rejection sampling |'
  PAGE.write_text(marks.with_table(page, 'accepted', '\n'.join([head, '|---' * 5 + '|', *shares])))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', required=True, help='a Hugging Face folder')
  parser.add_argument('--rows', type=int, default=4)
  parser.add_argument('--new', type=int, default=64, help='tokens of a completion')
  parser.add_argument('--repeats', type=int, default=3)
  options = parser.parse_args()
  folder = str(pathlib.Path(options.model).expanduser())
  policy = models.pretrained(path=folder, max_length=512)
  params, layers = policy.init(jax.random.key(0)), policy.config.num_layers
  prompts = laid_out(huggingface(path=folder).encode)
  sizes = dict(max_new_tokens=options.new, samples_per_prompt=options.rows)
  make = functools.cache(functools.partial(sampler, policy, params, prompts, **sizes))
  speed, shares = [], []
  for temperature, name, proposer in cases(layers):
    plain, fast = make(temperature), make(temperature, speculate=proposer)
    for work in WORKS:
      pair = (functools.partial(run, work) for run in (plain, fast))
      told = compared(*pair, options.repeats)
      speed.append(f'| {work} | {temperature:g} | {name} | {told} |')
      print(speed[-1], flush=True)
  for work in WORKS:
    drawn = jax.device_get(plain(work, 1))
    for part in sorted({layers // 2, layers * 2 // 3, -(-layers * 5 // 6), layers - 1}):
      numbers = ' | '.join(f'{x:.2f}' for x in accepted(policy, params, drawn, part))
      shares.append(f'| {work} | {part} of {layers} | {numbers} |')
      print(shares[-1], flush=True)
  write(speed, shares)


if __name__ == '__main__':
  main()
