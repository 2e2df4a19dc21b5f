"""How many completions does GRPO need for 80% on sums of mixed lengths, by curriculum?

    python -m benchmarks.curricula                # all curricula, three seeds; resumes where it stopped
    python -m benchmarks.curricula uniform vade   # some of them
    python -m benchmarks.curricula --table        # only writes the table into docs/curricula.md

All curricula of a seed begin with the same supervised checkpoint and make steps of the same size. A
completion counts when it is sampled, so those that dynamic sampling replaces count too. Accuracy is
that of greedy answers to the problems that are trained on, every five steps. The ratio to `uniform` is
taken within a seed. Results are appended to docs/curricula.jsonl, one line a run.
"""

import argparse
import functools
import pathlib
import statistics
from collections import defaultdict

import jax
import jax.numpy as jnp

from benchmarks import marks
from benchmarks.learning import Recorder, keep_nothing
from polgrad import build, phases
from polgrad.options import from_text
from polgrad.types import Params

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'curricula.jsonl', DOCS / 'curricula.md'
GOAL, NEVER = 0.8, float('inf')
TASK = 'task=mixed_sums,digits=2,problems=200,model=tiny,kl_coefficient=0,learning_rate=0.0002'
SETTINGS = {
  'uniform': 'method=grpo,curriculum=uniform',
  'epochs': 'method=grpo',
  'vade': 'method=grpo,curriculum=vade',
  'sec': 'method=grpo,curriculum=sec',
  'spo': 'method=grpo,curriculum=spo',
  'dynamic_sampling': 'method=grpo,curriculum=uniform',
}


def load(name: str, seed: int, steps: int):
  config = from_text(f'{SETTINGS[name]},{TASK},steps={steps},seed={seed},trackers=none')
  config.samples_every = config.checkpoint_every = config.rollouts.every = 0
  config.evaluation.every = 5
  config.evaluation.source = config.phases.train.source  # accuracy on what is trained on
  config.mesh.data = 1
  if name == 'dynamic_sampling':
    config.phases.train.collect.max_resamples = 2
  return config


def run(config, name: str, params: Params | None) -> tuple[Params, list[dict]]:
  """Makes the steps of one phase, from given parameters if there are any."""
  config.phases = {name: config.phases[name]}
  config.order = (name,)
  experiment, recorder = build.build(config), Recorder()
  with jax.set_mesh(experiment.mesh):
    state = phases.begin(experiment, 0, None)
    if params is not None:  # updates take the arrays over, so they are copied
      state = phases.begin(experiment, 0, state.replace(params=jax.tree.map(jnp.copy, params)))
    state = phases.run_phase(experiment, state, keep_nothing, phases.Logs(writer=recorder))
  return state.params, recorder.rows


@functools.cache
def warm(seed: int, steps: int) -> Params:
  """The parameters after the supervised phase that all curricula of a seed share."""
  config = load('epochs', seed, 1)
  config.phases.warm_start.steps = steps
  config.evaluation.every = 0
  return run(config, 'warm_start', None)[0]


def measure(name: str, seed: int, steps: int, warm_start: int) -> dict:
  """Trains with one curriculum; the completions until the accuracy is `GOAL`, None if it never is."""
  config = load(name, seed, steps)
  rows = config.phases.train.collect.prompts * config.phases.train.collect.samples_per_prompt
  _, found = run(config, 'train', warm(seed, warm_start))
  sampled, curve = 0.0, []
  for row in found:
    sampled += row.get('rollouts', rows) if 'loss' in row else 0
    if 'evaluation/greedy' in row:
      curve.append([int(sampled), round(row['evaluation/greedy'], 4)])
  reached = [n for n, accuracy in curve if accuracy >= GOAL]
  return {
    'curriculum': name,
    'seed': seed,
    'steps': steps,
    'warm_start': warm_start,
    'reached': reached[0] if reached else None,
    'curve': curve,
  }


def read() -> list[dict]:
  return marks.read(RESULTS)


def table(results: list[dict]) -> str:
  """One row a curriculum: completions to the goal, their ratio to `uniform`, and the last accuracy."""
  by_name = defaultdict(dict)
  for one in results:
    by_name[one['curriculum']][one['seed']] = one
  reached = lambda one: NEVER if one['reached'] is None else one['reached']
  base = {seed: reached(one) for seed, one in by_name['uniform'].items()}
  lines = [
    '| curriculum | completions to 80%, by seed | median | ratio to `uniform` | accuracy at the end |',
    '|---|---|---|---|---|',
  ]
  for name in (n for n in SETTINGS if by_name[n]):
    seeds = dict(sorted(by_name[name].items()))
    counts = [reached(one) for one in seeds.values()]
    # A seed whose `uniform` never reaches the goal has no ratio.
    ratios = [reached(one) / base[s] for s, one in seeds.items() if base.get(s, NEVER) < NEVER]
    ends = [one['curve'][-1][1] for one in seeds.values()]
    cells = [
      f'`{name}`',
      ', '.join(_counted(n, ',.0f') for n in counts),
      _counted(statistics.median(counts), ',.0f'),
      _median_and_range(ratios),
      _median_and_range(ends),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _counted(number: float, style: str) -> str:
  return 'never' if number == NEVER else f'{number:{style}}'


def _median_and_range(numbers: list[float]) -> str:
  """`1.53 (1.18 to 1.56)`; nothing of no numbers."""
  if not numbers:
    return ''
  middle, low, high = (_counted(f(numbers), '.2f') for f in (statistics.median, min, max))
  return f'{middle} ({low} to {high})'


def with_table(text: str, results: list[dict]) -> str:
  """The text of the page with the table of these results between its two marks."""
  return marks.with_table(text, 'table', table(results))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('curricula', nargs='*', metavar='CURRICULUM', help=', '.join(SETTINGS))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=160)
  parser.add_argument('--warm_start', type=int, default=30)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.curricula} - SETTINGS.keys():
    parser.error(f'unknown {sorted(unknown)}; valid: {list(SETTINGS)}')
  if not args.table:
    done = {(one['curriculum'], one['seed']) for one in read()}
    for seed in range(args.seeds):
      for name in args.curricula or SETTINGS:
        if (name, seed) not in done:
          found = measure(name, seed, args.steps, args.warm_start)
          print(name, seed, found['reached'], found['curve'][-1], flush=True)
          marks.append(RESULTS, found)
  print(table(read()))
  PAGE.write_text(with_table(PAGE.read_text(), read()))


if __name__ == '__main__':
  main()
