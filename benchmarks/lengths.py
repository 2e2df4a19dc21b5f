"""What do length-aware methods do to accuracy and length, from one checkpoint a seed?

    python -m benchmarks.lengths               # all methods, three seeds; resumes where it stopped
    python -m benchmarks.lengths grpo l1_max   # some of them
    python -m benchmarks.lengths --table       # only writes the table into docs/curricula.md

The supervised phase teaches the task `worked_sums`: answers with all of the work, with some, or with
none. More work makes an answer longer and more often right, so a method must choose. Every method makes
the same number of steps of the same size. Accuracy and length are those of the same answers: two samples
of each of 200 held-out problems, before and after. Results are appended to docs/lengths.jsonl.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
from collections import defaultdict

import jax
import numpy as np

from benchmarks import marks
from benchmarks.curricula import run
from polgrad import build, evaluate, methods, presets, tasks
from polgrad.compose import compose
from polgrad.sampling import behavior_policies
from polgrad.types import Params

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'lengths.jsonl', DOCS / 'curricula.md'
TARGET, PRICE = 10, 0.05  # tokens that L1 asks for, and the reward that each other one costs
METHODS = {
  'grpo': functools.partial(methods.grpo, kl_coefficient=0.0),
  'dr_grpo': methods.dr_grpo,
  'dapo': functools.partial(methods.dapo, max_resamples=0),
  'opo': methods.opo,
  'adora': methods.adora,
  'grpo_lead': methods.grpo_lead,
  'gfpo': functools.partial(methods.gfpo, keep=4),
  'drpo': methods.drpo,
  'hipo': functools.partial(methods.hipo, mode_pattern='^:'),
  'l1_exact': functools.partial(methods.l1_exact, alpha=PRICE, target=TARGET),
  'l1_max': functools.partial(methods.l1_max, alpha=PRICE, target=TARGET),
}
KINDS = ('none', 'some', 'all')  # of the work


def load(name: str, seed: int, steps: int, warm_start: int):
  """The run of a method on sums of two digits, behind a supervised phase on answers of three lengths."""
  task = dataclasses.replace(
    tasks.worked_sums(), rows=128, held_out_problems=200, evaluation_batch=200
  )
  config = compose(
    METHODS[name],
    task,
    presets.tiny(alphabet=task.alphabet),
    steps=steps,
    seed=seed,
    warm_start=warm_start,
    learning_rate=2e-4,
    trackers='none',
  )
  config.samples_every = config.checkpoint_every = config.rollouts.every = 0
  config.show_samples = config.evaluation.every = 0
  config.mesh.data = 1
  return config


@functools.cache
def warm(seed: int, warm_start: int) -> Params:
  """The parameters after the supervised phase that all methods of a seed share."""
  return run(load('grpo', seed, 1, warm_start), 'warm_start', None)[0]


def kind(text: str) -> str:
  """How much work an answer has.

  >>> [kind(text) for text in ('107', ':07 10 107', ':6+1+0=07:1+9+0=10 107')]
  ['none', 'some', 'all']
  """
  return 'all' if '+' in text else 'some' if ':' in text else 'none'


def answers(config, params: Params) -> dict:
  """Accuracy and mean length of samples, and for each kind of answer its share and its accuracy."""
  experiment, lengths = build.build(config), []
  look = lambda rollout, rows, others: lengths.extend(rollout.mask.sum(axis=1)[:rows].tolist())
  with jax.set_mesh(experiment.mesh):
    sample = evaluate.sampler(experiment, 2, behavior_policies.current)
    found = evaluate.attempt(experiment, sample, params, 2, look)
  right, kinds = found.scores.ravel(), np.array([kind(t) for row in found.texts for t in row])
  each = {k: right[kinds == k] for k in KINDS}
  return {
    'accuracy': round(float(right.mean()), 4),
    'length': round(statistics.mean(lengths), 2),
    'kinds': {k: [len(x), round(float(x.mean()), 3) if len(x) else None] for k, x in each.items()},
  }


@functools.cache
def before(seed: int, warm_start: int) -> dict:
  return answers(load('grpo', seed, 1, warm_start), warm(seed, warm_start))


def measure(name: str, seed: int, steps: int, warm_start: int) -> dict:
  """Trains with one method; what its answers are before and after."""
  config = load(name, seed, steps, warm_start)
  params, _ = run(config, 'train', warm(seed, warm_start))
  return {
    'method': name,
    'seed': seed,
    'steps': steps,
    'warm_start': warm_start,
    'before': before(seed, warm_start),
    'after': answers(load('grpo', seed, 1, warm_start), params),
  }


def read() -> list[dict]:
  return marks.read(RESULTS)


def table(results: list[dict]) -> str:
  """One row a method: accuracy and length after training, mean and range if there are several seeds."""
  by_name = defaultdict(list)
  for one in results:
    by_name[one['method']].append(one['after'])
  first = [one['before'] for one in {one['seed']: one for one in results}.values()]
  lines = [
    '| method | accuracy of samples | their mean length | answers with all, some, no work |',
    '|---|---|---|---|',
    _line('before', first),
    *(_line(f'`{name}`', by_name[name]) for name in METHODS if name in by_name),
  ]
  return '\n'.join(lines)


def _line(name: str, found: list[dict]) -> str:
  def whole(key, style):
    numbers = [one[key] for one in found]
    span = f' ({min(numbers):{style}} to {max(numbers):{style}})' if len(numbers) > 1 else ''
    return f'{statistics.mean(numbers):{style}}{span}'

  share = lambda k: statistics.mean(
    one['kinds'][k][0] / sum(number for number, _ in one['kinds'].values()) for one in found
  )
  shares = ', '.join(f'{share(k):.0%}' for k in reversed(KINDS))
  return f'| {name} | {whole("accuracy", ".2f")} | {whole("length", ".1f")} | {shares} |'


def with_table(text: str, results: list[dict]) -> str:
  """The text of the page with the table of these results between its two marks."""
  return marks.with_table(text, 'lengths', table(results))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('methods', nargs='*', metavar='METHOD', help=', '.join(METHODS))
  parser.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--warm_start', type=int, default=350)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.methods} - METHODS.keys():
    parser.error(f'unknown {sorted(unknown)}; valid: {list(METHODS)}')
  if not args.table:
    done = {(one['method'], one['seed']) for one in read()}
    for seed in args.seeds:
      for name in args.methods or METHODS:
        if (name, seed) not in done:
          found = measure(name, seed, args.steps, args.warm_start)
          print(name, seed, found['before'], found['after'], flush=True)
          marks.append(RESULTS, found)
  print(table(read()))
  PAGE.write_text(with_table(PAGE.read_text(), read()))


if __name__ == '__main__':
  main()
