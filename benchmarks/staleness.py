"""What do old rows cost?

    python -m benchmarks.staleness              # all methods and lags; resumes
    python -m benchmarks.staleness grpo topr    # some methods
    python -m benchmarks.staleness --table      # only writes the table into docs/asynchronous.md

All methods of a seed begin with the same supervised checkpoint and make the same steps on two-digit
addition; rows are used LAG steps after they were sampled. Accuracy is that of greedy answers to 400
held-out problems. What sampling beside training saves is measured by `benchmarks.modes`.

Results are appended to docs/staleness.jsonl.
"""

import argparse
import functools
import pathlib
import statistics
from collections import defaultdict

from benchmarks import hybrids, marks
from benchmarks.curricula import run
from polgrad import methods
from polgrad.types import Params

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'staleness.jsonl', DOCS / 'asynchronous.md'
METHODS, LAGS = ('grpo', 'online_dpo', 'tba', 'm2po', 'topr'), (0, 1, 4, 8)


def load(name: str, seed: int, steps: int, lag: int = 0, warm_start: int = 1):
  """The run of a method whose rows are `lag` steps old."""
  config = hybrids.load(methods.TABLE[name], seed, steps, warm_start)
  config.evaluation.every = steps
  config.phases.train.collect.lag = lag
  return config


@functools.cache
def warm(seed: int, warm_start: int) -> Params:
  """The parameters after the supervised phase that all methods of a seed share."""
  config = load('grpo', seed, 1, 0, warm_start)
  config.evaluation.every = 0
  return run(config, 'warm_start', None)[0]


def accuracy(name: str, lag: int, seed: int, steps: int, warm_start: int) -> dict:
  """The accuracy before and after the steps of a method with this lag."""
  _, found = run(load(name, seed, steps, lag), 'train', warm(seed, warm_start))
  measured = [row['evaluation/greedy'] for row in found if 'evaluation/greedy' in row]
  last = found[-1]
  return {
    'method': name,
    'lag': lag,
    'seed': seed,
    'steps': steps,
    'before': measured[0],
    'after': measured[-1],
    'kl': round(last['sampler_kl'], 5),
    'sample_size': round(last['effective_sample_size'], 4),
  }


def read() -> list[dict]:
  return marks.read(RESULTS)


def table(results: list[dict]) -> str:
  """Accuracy by method and lag."""
  by_name = defaultdict(lambda: defaultdict(list))
  for one in results:
    by_name[one['method']][one['lag']].append(one)
  rows = []
  for name in (n for n in METHODS if by_name[n]):
    found = by_name[name]
    before = {one['seed']: one['before'] for several in found.values() for one in several}
    cells = [_mean(before.values()), *(_mean(x['after'] for x in found[lag]) for lag in LAGS)]
    rows.append([f'`{name}`', *cells])
  return marks.table(['method', 'before', *(f'lag {lag}' for lag in LAGS)], rows)


def _mean(numbers) -> str:
  numbers = list(numbers)
  return f'{statistics.mean(numbers):.3f}' if numbers else ''


def with_table(text: str, results: list[dict]) -> str:
  """The text of the page with the table of these results between its two marks."""
  return marks.with_table(text, 'staleness', table(results))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('methods', nargs='*', metavar='METHOD', help=', '.join(METHODS))
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--warm_start', type=int, default=180)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.methods} - {*METHODS}:
    parser.error(f'unknown {sorted(unknown)}; valid: {METHODS}')
  if not args.table:
    done = {(one['method'], one['lag'], one['seed']) for one in read()}
    for seed in range(args.seeds):
      for name in args.methods or METHODS:
        for lag in LAGS:
          if (name, lag, seed) not in done:
            found = accuracy(name, lag, seed, args.steps, args.warm_start)
            print(found, flush=True)
            marks.append(RESULTS, found)
  print(table(read()))
  PAGE.write_text(with_table(PAGE.read_text(), read()))


if __name__ == '__main__':
  main()
