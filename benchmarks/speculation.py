"""Speculative decoding: how many tokens a pass gives, what it saves, and what checking costs.

    python -m benchmarks.speculation --model=~/smollm2 [--rows 1 4 16] [--new=64] [--repeats=3]
    python -m benchmarks.speculation

Rows are drawn with proposals and without them, in turn. The rows are equal, except for those in which a
rounding of logits has changed a token; their fraction is in the table. Costs are CPU seconds of one
process, and a speed-up is the median of ratios of neighbours. `copy` asks for a text again, `sums` for
sums after worked ones. Without a model, one of 74 million random weights shows both ends: at
temperature 1 no n-gram is ever right, and greedy rows repeat themselves.

The table `accepted` is of proposals by the first layers of a model at temperature 1, in the places of a
text (docs/architecture.md): the mean probability that a proposal is drawn. By common noise it is

    sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)

over groups of tokens, times the same over the tokens of each group, by which the sampler draws. For one
draw it is at least (1 - TV) / (1 + TV), with rejection sampling 1 - TV, where TV is the total variation
distance of both. The table `n-gram` has the mean probability of the token that an n-gram proposes, in
the places of three texts: that page, the second one of a text that is there twice, and sums after the
first of them. The command writes the tables of docs/sampling.md.
"""

import argparse
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import marks
from polgrad import models
from polgrad.data.tokenizers import huggingface
from polgrad.models.transformer import rms_norm
from polgrad.sampling import decoding, make_sampler
from polgrad.sampling.sampler import behavior_at
from polgrad.sampling.speculation import FirstLayers, NGram, Proposer, continued
from polgrad.types import Batch

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'sampling.md'
LONG = PAGE.with_name('architecture.md')
PLACES = 400
RANDOM = dict(
  vocab_size=8192, num_layers=4, width=1024, num_heads=16, num_kv_heads=4, head_dim=64, mlp_width=4096,
  max_length=128,
)  # fmt: skip
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
  part = min(-(-layers * 5 // 6), layers - 1)
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

  With common noise a group is drawn as the sampler does, and then one of its tokens.

  Args:
    p, q: probabilities f64[V].
  """
  within, groups = decoding.group_sizes(len(p))
  # The tokens of a group are `groups` places apart.
  rows = [np.pad(x, (0, within * groups - len(x))).reshape(within, groups).T for x in (p, q)]
  both = both_draw(*(x.sum(axis=1) for x in rows))
  parts = [x / np.maximum(x.sum(axis=1, keepdims=True), 1e-300) for x in rows]
  return float(np.sum(both * both_draw(*parts).sum(axis=1))), float(np.minimum(p, q).sum())


def both_draw(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """The probability of each entry that p and q draw it with the same Gumbel noise, f64[..., n]."""
  order = np.argsort(p / np.maximum(q, 1e-300), axis=-1)
  ordered_p, ordered_q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
  # sum_j max(p_j / p_i, q_j / q_i): of the entries j behind i, p_j / p_i is the larger one.
  behind = np.cumsum(ordered_p[..., ::-1], axis=-1)[..., ::-1] - ordered_p
  before = np.cumsum(ordered_q, axis=-1)
  with np.errstate(divide='ignore', invalid='ignore'):
    each = 1 / (behind / ordered_p + before / ordered_q)
  found = np.empty_like(p)
  np.put_along_axis(found, order, np.where((ordered_p > 0) & (ordered_q > 0), each, 0), axis=-1)
  return found


def accepted(policy: models.Policy, params, tokens: np.ndarray) -> list[str]:
  """Lines of the table of proposals by the first layers, in the places of a text i32[T]."""
  config = policy.config
  layers = config.num_layers
  some = (layers // 2, layers * 2 // 3, -(-layers * 5 // 6), layers - 1, layers)

  @jax.jit
  def probabilities(params):
    states = policy.states(params, tokens[None], np.ones((1, len(tokens)), np.int32), layers=some)
    norm = functools.partial(
      rms_norm, scale=params['final_norm'], eps=config.norm_eps, offset=config.norm_offset
    )
    hidden = [norm(x[0]) for x in states[:-1]] + [states[-1][0]]
    return [jax.nn.softmax(policy.unembed(params, x)) for x in hidden]

  *parts, whole = (np.asarray(x, np.float64) for x in probabilities(params))
  lines = []
  for part, q in zip(some, parts):
    kept = np.array([agreement(*pair) for pair in zip(whole, q)])
    least = kept[:, 1] / (2 - kept[:, 1])
    numbers = ' | '.join(f'{x.mean():.2f}' for x in (kept[:, 0], least, kept[:, 1]))
    lines.append(f'| {part} of {layers} | {numbers} |')
  return lines


def n_grams(policy: models.Policy, params, texts: dict[str, tuple[list[int], int]]) -> list[str]:
  """Lines of the table of n-grams, in the places of texts.

  Args:
    texts: tokens, at most `PLACES`, and the first place that counts, by name.
  """

  @jax.jit
  def probabilities(params, tokens, segments):
    return jax.nn.softmax(policy.unembed(params, policy.hidden(params, tokens, segments)[0]))

  lines = []
  for name, (ids, first) in texts.items():
    tokens = np.pad(np.array(ids), (0, PLACES - len(ids)))
    p = probabilities(params, tokens[None], (np.arange(PLACES) < len(ids)).astype(np.int32)[None])
    places = np.arange(first, len(ids))
    rows = np.repeat(tokens[None], len(places), axis=0)
    proposed = np.asarray(continued(rows, places, tokens=1, longest=3))[:, 0]
    kept = np.asarray(p, np.float64)[places, proposed]
    lines.append(f'| {name} | {len(places)} | {np.mean(kept):.2f} | {np.mean(kept > 0.5):.2f} |')
  return lines


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


def write(mark: str, head: str, lines: list[str]) -> None:
  """Writes a table into the page."""
  table = '\n'.join([head, '|---' * (head.count('|') - 1) + '|', *lines])
  PAGE.write_text(marks.with_table(PAGE.read_text(), mark, table))


def random_model() -> tuple[models.Policy, Any, dict]:
  """A model whose next token nothing can guess at temperature 1, with random prompts."""
  policy = models.decoder(**RANDOM)
  tokens = np.random.default_rng(0).integers(0, RANDOM['vocab_size'], (1, 32))
  return policy, policy.init(jax.random.key(0)), {'random': (tokens, np.ones_like(tokens, bool))}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='', help='a Hugging Face folder; none: a random model')
  parser.add_argument('--rows', type=int, nargs='+', default=[1, 4, 16])
  parser.add_argument('--new', type=int, default=64, help='tokens of a completion')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--only', choices=['speed', 'accepted', 'n-gram'], help='one of the tables')
  options = parser.parse_args()
  if options.model:
    folder = str(pathlib.Path(options.model).expanduser())
    policy = models.pretrained(path=folder, max_length=512)
    params, encode = policy.init(jax.random.key(0)), huggingface(path=folder).encode
    prompts, mark = laid_out(encode), 'speculation'
    page = encode(LONG.read_text())[:PLACES]
    if options.only in (None, 'n-gram'):
      text, sums = encode(TEXT), encode(WORKS['sums'])
      texts = {'page': (page, 0), 'copy': (text * 2, len(text)), 'sums': (sums, len(sums) // 3)}
      head = '| text | places | probability of the proposal | above 1/2 in |'
      write('n-gram', head, n_grams(policy, params, texts))
    if options.only in (None, 'accepted'):
      tokens = np.array(page)
      head = '| layers | common noise | its least | rejection sampling |'
      write('accepted', head, accepted(policy, params, tokens))
  else:
    policy, params, prompts = random_model()
    mark = 'random'
  if options.only not in (None, 'speed'):
    return
  make = functools.partial(sampler, policy, params, prompts, max_new_tokens=options.new)
  lines = []
  for count in options.rows:
    for temperature, name, proposer in cases(policy.config.num_layers):
      plain = make(temperature, samples_per_prompt=count)
      fast = make(temperature, samples_per_prompt=count, speculate=proposer)
      for work in prompts:
        pair = (functools.partial(run, work) for run in (plain, fast))
        told = compared(*pair, options.repeats)
        lines.append(f'| {work} | {count} | {temperature:g} | {name} | {told} |')
        print(lines[-1], flush=True)
        head = (
          '| work | rows | temperature | proposer, tokens | tokens a pass | speed-up | differ |'
        )
        write(mark, head, lines)


if __name__ == '__main__':
  main()
