"""What does sampling beside training save, and what do old rows cost?

    python -m benchmarks.staleness              # all methods and lags, then the speed; resumes
    python -m benchmarks.staleness grpo topr    # accuracy of some methods
    python -m benchmarks.staleness --speed      # only the speed
    python -m benchmarks.staleness --table      # only writes both tables into docs/asynchronous.md

Accuracy: all methods of a seed begin with the same supervised checkpoint and make the same steps on
two-digit addition; rows are used LAG steps after they were sampled. Accuracy is that of greedy answers
to 400 held-out problems.

Speed: seconds of a step of GRPO with lag 1, in turns and with `overlap`, in one process, where verifiers
wait on purpose, as a slow sampler, judge or environment does.

Results are appended to docs/staleness.jsonl.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections import defaultdict

from benchmarks import hybrids, marks
from benchmarks.curricula import run
from polgrad import methods
from polgrad.registry import part, weighted
from polgrad.types import Params

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'staleness.jsonl', DOCS / 'asynchronous.md'
METHODS, LAGS = ('grpo', 'online_dpo', 'tba', 'm2po', 'topr'), (0, 1, 4, 8)
WAITS = (0.0, 0.5, 1.0, 2.0)  # of verifiers, in steps without any


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


def waiting(completion: str, *, seconds: float) -> float:
  """A verifier that takes its time."""
  time.sleep(seconds)
  return 0.0


def speed(overlap: bool, seconds: float, steps: int = 12) -> float:
  """The median seconds of a step with lag 1, the first three left out.

  Args:
    seconds: that the verifiers of a batch wait.
  """
  config = load('grpo', 0, steps, 1)
  collect = config.phases.train.collect
  collect.overlap = overlap
  rows = collect.prompts * collect.samples_per_prompt
  config.evaluation.every = 0
  with config.unlocked():
    config.phases.train.reward.slow = weighted(0.0, part(waiting, seconds=seconds / rows))
  _, found = run(config, 'train', None)
  return statistics.median(row['seconds'] for row in found[3:])


def speeds() -> dict:
  """Seconds of a step by how long verifiers wait: [(wait, in turns, overlapped), ...].

  The waits are fractions of the seconds that a step takes without any.
  """
  alone = speed(False, 0.0)
  rows = []
  for fraction in WAITS:
    wait = fraction * alone
    rows.append([fraction, round(speed(False, wait), 4), round(speed(True, wait), 4)])
  return {'speed': rows}


def read() -> list[dict]:
  lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
  return [json.loads(line) for line in lines]


def tables(results: list[dict]) -> str:
  """Accuracy by method and lag, and the speed of the last measurement."""
  by_name = defaultdict(lambda: defaultdict(list))
  for one in (x for x in results if 'method' in x):
    by_name[one['method']][one['lag']].append(one)
  lines = [
    '| method | before |' + ''.join(f' lag {lag} |' for lag in LAGS),
    '|---' * (len(LAGS) + 2) + '|',
  ]
  for name in (n for n in METHODS if by_name[n]):
    found = by_name[name]
    before = {one['seed']: one['before'] for several in found.values() for one in several}
    cells = [_mean(before.values()), *(_mean(x['after'] for x in found[lag]) for lag in LAGS)]
    lines.append(f'| `{name}` | {" | ".join(cells)} |')
  measured = [one['speed'] for one in results if 'speed' in one]
  if measured:
    lines += [
      '',
      '| verifiers wait, in steps | in turns, s | with `overlap`, s | faster by |',
      '|---|---|---|---|',
    ]
    lines += [f'| {w:g} | {a:.2f} | {b:.2f} | {a / b:.2f} x |' for w, a, b in measured[-1]]
  return '\n'.join(lines)


def _mean(numbers) -> str:
  numbers = list(numbers)
  return f'{statistics.mean(numbers):.3f}' if numbers else ''


def with_tables(text: str, results: list[dict]) -> str:
  """The text of the page with these tables between its two marks."""
  return marks.with_table(text, 'staleness', tables(results))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('methods', nargs='*', metavar='METHOD', help=', '.join(METHODS))
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--warm_start', type=int, default=180)
  parser.add_argument('--speed', action='store_true')
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.methods} - {*METHODS}:
    parser.error(f'unknown {sorted(unknown)}; valid: {METHODS}')
  keep = lambda found: RESULTS.open('a').write(json.dumps(found) + '\n')
  if not (args.table or args.speed):
    done = {(one['method'], one['lag'], one['seed']) for one in read() if 'method' in one}
    for seed in range(args.seeds):
      for name in args.methods or METHODS:
        for lag in LAGS:
          if (name, lag, seed) not in done:
            found = accuracy(name, lag, seed, args.steps, args.warm_start)
            print(found, flush=True)
            keep(found)
  if args.speed or not (args.table or args.methods):
    keep(speeds())
  print(tables(read()))
  PAGE.write_text(with_tables(PAGE.read_text(), read()))


if __name__ == '__main__':
  main()
