"""Does it learn? Every policy-gradient method on the quickstart's task, from one checkpoint a seed.

    python -m benchmarks.learning              # all methods, three seeds; resumes where it stopped
    python -m benchmarks.learning grpo cispo   # some of them
    python -m benchmarks.learning --table      # writes docs/learning.md from what there is

A seed's supervised checkpoint is trained once and used by every method; each then makes the same
number of collected batches of the same size. Results are appended to docs/learning.jsonl. A result with
`"earlier": true` is of a formula or of defaults that the method had before; the next call measures it
again.
"""

import argparse
import functools
import pathlib
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import marks
from polgrad import build, evaluate, methods, phases
from polgrad.options import from_text
from polgrad.types import Params, TrainState

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, PAGE = ROOT / 'docs' / 'learning.jsonl', ROOT / 'docs' / 'learning.md'
NAMES = methods.FAMILIES['policy_gradient']


def load(name: str, seed: int, steps: int, prompts: int):
  config = from_text(f'method={name},task=addition,model=tiny,steps={steps}')
  config.seed = seed
  config.samples_every = config.checkpoint_every = config.evaluation.every = 0
  for phase in config.phases.values():
    if 'prompts' in phase.collect:  # the same rows for all, however they are grouped
      rows = phase.collect.samples_per_prompt * phase.collect.prompts
      phase.collect.prompts = phase.collect.prompts * prompts * 8 // rows
  return config


class Recorder:
  """Keeps the metrics of a phase in the place of a `metrics.Writer`."""

  def __init__(self):
    self.rows = []

  def write(self, step: int, phase: str, values: dict) -> None:
    self.rows.append(values)


def keep_nothing(state: TrainState) -> None:
  """Where a checkpoint would be written."""


@functools.cache
def warm(seed: int) -> Params:
  """The parameters after the supervised phase that all methods share."""
  config = load('grpo', seed, 1, 32)
  config.phases = {'warm_start': config.phases.warm_start}
  config.order = ('warm_start',)
  experiment = build.build(config)
  with jax.set_mesh(experiment.mesh):
    state = phases.begin(experiment, 0, None)
    return phases.run_phase(experiment, state, keep_nothing, phases.Logs()).params


def learn(name: str, seed: int, steps: int, prompts: int) -> dict:
  """Trains one method from the checkpoint of a seed; what to write down of it."""
  checkpoint = warm(seed)
  config = load(name, seed, steps, prompts)
  last = config.order[-1]
  config.phases = {last: config.phases[last]}
  config.order = (last,)
  experiment = build.build(config)
  started = time.perf_counter()
  with jax.set_mesh(experiment.mesh):
    fresh = phases.begin(experiment, 0, None)
    # A value head is not in the checkpoint. Updates take the arrays over, so the checkpoint is copied.
    params = {**fresh.params, **jax.tree.map(jnp.copy, checkpoint)}
    state = phases.begin(experiment, 0, fresh.replace(params=params))
    measure = evaluate.make_evaluator(experiment)
    accuracy = lambda state: measure(state.params)[0]['evaluation/greedy']
    before, recorder = accuracy(state), Recorder()
    state = phases.run_phase(experiment, state, keep_nothing, phases.Logs(writer=recorder))
  return {
    'method': name,
    'seed': seed,
    'steps': steps,
    'rows': experiment.phases[last].collect.rows,
    'before': before,
    'after': accuracy(state),
    'reward': [round(row['reward'], 3) for row in recorder.rows if 'reward' in row],
    'skipped': sum(row['skipped'] for row in recorder.rows),
    'seconds': round(time.perf_counter() - started, 1),
  }


def done() -> set[tuple[str, int]]:
  return {(r['method'], r['seed']) for r in marks.read(RESULTS) if not r.get('earlier')}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('methods', nargs='*', help=f'out of {", ".join(NAMES)}')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=24, help='collected batches')
  parser.add_argument('--prompts', type=int, default=32, help='of eight rows, a batch')
  parser.add_argument('--share', default='0/1', help='i/n: every n-th method, for n processes')
  parser.add_argument('--table', action='store_true', help='only write the page')
  arguments = parser.parse_args()
  unknown = sorted(set(arguments.methods) - set(NAMES))
  if unknown:
    parser.error(f'unknown {unknown}; valid: {NAMES}')
  index, count = map(int, arguments.share.split('/'))
  for name in [] if arguments.table else (arguments.methods or NAMES)[index::count]:
    for seed in range(arguments.seeds):
      if (name, seed) in done():
        continue
      row = learn(name, seed, arguments.steps, arguments.prompts)
      marks.append(RESULTS, row)
      print({k: v for k, v in row.items() if k != 'reward'}, flush=True)
  write_page()


def write_page() -> None:
  rows = marks.read(RESULTS)
  by_method = defaultdict(dict)
  for row in rows:
    by_method[row['method']][row['seed']] = row
  seeds = sorted({row['seed'] for row in rows})
  mean = lambda name: np.mean([r['after'] for r in by_method[name].values()])
  lines = [
    '# Learning: policy-gradient methods on one task',
    '',
    f'`python -m benchmarks.learning`: two-digit addition, {rows[0]["steps"]} collected batches of '
    f'{rows[0]["rows"]} rows from the supervised',
    'checkpoint of each seed, greedy accuracy on 400 held-out problems (standard error at most',
    '0.025). One learning rate for nearly all, none of them tuned: this shows that a method learns and',
    'does not fall apart, not which one is best. A star marks results of a formula or of defaults that',
    'the method had earlier. They have not been measured again yet, and methods without a row never.',
    '',
    '| method | ' + ' | '.join(f'seed {s}' for s in seeds) + ' | mean | skipped updates |',
    '|---|' + '---|' * (len(seeds) + 2),
    '| supervised checkpoint | '
    + ' | '.join(f'{_start(by_method, s):.2f}' for s in seeds)
    + ' | | |',
  ]
  for name in sorted(by_method, key=mean, reverse=True):
    own = by_method[name]
    cells = ' | '.join(f'{own[s]["after"]:.2f}' if s in own else '' for s in seeds)
    skipped = sum(r['skipped'] for r in own.values())
    star = ' *' if any(r.get('earlier') for r in own.values()) else ''
    lines.append(f'| `{name}`{star} | {cells} | {mean(name):.2f} | {skipped:.0f} |')
  PAGE.write_text('\n'.join(lines) + '\n')


def _start(by_method: dict, seed: int) -> float:
  return next(rows[seed]['before'] for rows in by_method.values() if seed in rows)


if __name__ == '__main__':
  cache = pathlib.Path('~/.cache/polgrad/benchmarks').expanduser()
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  main()
