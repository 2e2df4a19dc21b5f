"""What do length-aware methods do to accuracy and length, from one checkpoint a seed?

    python -m benchmarks.lengths               # all methods, three seeds; resumes where it stopped
    python -m benchmarks.lengths grpo l1_max   # some of them
    python -m benchmarks.lengths --table       # prints the table from what there is

The supervised phase teaches sums whose answers have 0 to 6 dots before them, `12+34=...46`. The dots
do not help, so a method is free to keep, drop or add them. Every method makes the same number of steps
of the same size. Results are appended to docs/lengths.jsonl.

Measured on a CPU, 40 steps, three seeds: mean (lowest to highest).

    method     greedy accuracy            mean length of samples
    before     0.000 (0.000 to 0.000)     6.3 (6.0 to 6.5)
    grpo       0.910 (0.873 to 0.960)     3.6 (3.5 to 3.6)
    dr_grpo    0.904 (0.863 to 0.963)     3.6 (3.5 to 3.6)
    dapo       0.933 (0.900 to 0.985)     3.6 (3.5 to 3.7)
    grpo_lead  0.897 (0.860 to 0.955)     3.6 (3.5 to 3.6)
    l1_exact   0.866 (0.785 to 0.930)     3.6 (3.5 to 3.6)
    l1_max     0.907 (0.885 to 0.948)     3.6 (3.5 to 3.6)
    gfpo       0.848 (0.792 to 0.917)     3.9 (3.6 to 4.2)
    opo        0.917 (0.875 to 0.963)     3.6 (3.5 to 3.6)

The greedy answer before training is only dots, because a further dot is nearly always the likeliest
token. Every method removes the dots, those without a length term too: an answer without them is right
more often. So this task tells whether a method keeps accuracy while answers become short, and not how
strong its pressure on length is: `l1_exact` does not keep its target of 5 tokens against that.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import random
import statistics
from collections import defaultdict
from typing import Annotated

from benchmarks.curricula import run
from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.data.sources import FRACTION, Source
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.types import Params

RESULTS = pathlib.Path(__file__).parent.parent / 'docs' / 'lengths.jsonl'
LONGEST = 12  # tokens of a completion, the stop token included
METHODS = {
  'grpo': methods.grpo,
  'dr_grpo': methods.dr_grpo,
  'dapo': methods.dapo,
  'grpo_lead': methods.grpo_lead,
  'l1_exact': functools.partial(methods.l1_exact, alpha=0.05, target=5),
  'l1_max': functools.partial(methods.l1_max, alpha=0.05, target=5),
  'gfpo': functools.partial(methods.gfpo, keep=4),
  'opo': methods.opo,
}


def dotted(*, source: Annotated[Source, FRACTION], most: int) -> Source:
  """Sums whose answers have a random number of dots before them, at most `most`."""

  def record(row):
    found = source[row]
    return found | {'answer': '.' * random.Random(row).randint(0, most) + found['answer']}

  return Source(len(source), record)


def load(name: str, seed: int, steps: int, warm_start: int):
  """The run of a method on sums of two digits, behind a supervised phase on answers with dots."""
  task = tasks.addition()
  task = dataclasses.replace(
    task,
    demonstrations=part(dotted, source=task.problems, most=LONGEST - 6),
    rewards={'exact': weighted(1.0, part(verifiers.numeric_answer))},
    alphabet=task.alphabet + '.',
    max_new_tokens=LONGEST,
    length=task.prompt_length + LONGEST,
    rows=128,
    pairs=None,
    feedback=None,
    lists=None,
  )
  model = presets.tiny(alphabet=task.alphabet)
  config = compose(
    METHODS[name],
    task,
    model,
    steps=steps,
    seed=seed,
    warm_start=warm_start,
    learning_rate=2e-4,
    trackers='none',
  )
  config.samples_every = config.checkpoint_every = config.rollouts.every = 0
  config.show_samples = 0
  config.evaluation.every = steps
  config.mesh.data = 1
  return config


@functools.cache
def warm(seed: int, warm_start: int) -> Params:
  """The parameters after the supervised phase that all methods of a seed share."""
  config = load('grpo', seed, 1, warm_start)
  config.evaluation.every = 0
  return run(config, 'warm_start', None)[0]


def measure(name: str, seed: int, steps: int, warm_start: int) -> dict:
  """Trains with one method: accuracy (greedy) and mean length (of the samples) before and after."""
  _, rows = run(load(name, seed, steps, warm_start), 'train', warm(seed, warm_start))
  greedy = [row['evaluation/greedy'] for row in rows if 'evaluation/greedy' in row]
  lengths = [row['length'] for row in rows if 'length' in row]
  return {
    'method': name,
    'seed': seed,
    'steps': steps,
    'warm_start': warm_start,
    'greedy': [round(greedy[0], 4), round(greedy[-1], 4)],
    'length': [
      round(statistics.mean(lengths[:3]), 2),
      round(statistics.mean(lengths[-3:]), 2),
    ],
  }


def read() -> list[dict]:
  lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
  return [json.loads(line) for line in lines]


def table(results: list[dict]) -> str:
  """One row a method: mean and range over seeds of accuracy and length after training."""
  by_name = defaultdict(list)
  for one in results:
    by_name[one['method']].append(one)
  whole = lambda found, style: (
    f'{statistics.mean(found):{style}} ({min(found):{style}} to {max(found):{style}})'
  )
  first = list({one['seed']: one for one in results}.values())
  lines = [
    '| method | greedy accuracy | mean length of samples |',
    '|---|---|---|',
    f'| before | {whole([one["greedy"][0] for one in first], ".3f")} '
    f'| {whole([one["length"][0] for one in first], ".1f")} |',
  ]
  for name in (n for n in METHODS if n in by_name):
    greedy, length = (
      whole([one[key][1] for one in by_name[name]], style)
      for key, style in (('greedy', '.3f'), ('length', '.1f'))
    )
    lines.append(f'| `{name}` | {greedy} | {length} |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('methods', nargs='*', metavar='METHOD', help=', '.join(METHODS))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--warm_start', type=int, default=600)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.methods} - METHODS.keys():
    parser.error(f'unknown {sorted(unknown)}; valid: {list(METHODS)}')
  if not args.table:
    done = {(one['method'], one['seed']) for one in read()}
    for seed in range(args.seeds):
      for name in args.methods or METHODS:
        if (name, seed) not in done:
          found = measure(name, seed, args.steps, args.warm_start)
          print(name, seed, found['greedy'], found['length'], flush=True)
          with RESULTS.open('a') as file:
            file.write(json.dumps(found) + '\n')
  print(table(read()))


if __name__ == '__main__':
  main()
