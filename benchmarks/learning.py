"""Does it learn? Every policy-gradient experiment on the quickstart's task, from one checkpoint a seed.

    python -m benchmarks.learning              # all methods, three seeds; goes on where it stopped
    python -m benchmarks.learning grpo cispo   # some of them
    python -m benchmarks.learning --table      # writes docs/learning.md from what there is

A seed's supervised checkpoint is trained once and used by every method; each then makes the same
number of collected batches of the same size. Results are appended to docs/learning.jsonl.
"""

import argparse
import functools
import importlib
import json
import pathlib
import time
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import build, evaluate, sharding, train
from polgrad.collect import minibatches
from polgrad.types import Params

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'experiments' / 'policy_gradient'
RESULTS, PAGE = ROOT / 'docs' / 'learning.jsonl', ROOT / 'docs' / 'learning.md'
NAMES = sorted(p.stem for p in FOLDER.glob('*.py') if not p.stem.startswith(('__', 'hub_')))


def load(name: str, seed: int, steps: int, prompts: int):
  config = importlib.import_module(f'experiments.policy_gradient.{name}').get_config(
    f'steps={steps}'
  )
  config.seed = seed
  config.checkpoint_every = config.evaluation.every = 0
  for phase in config.phases.values():
    if 'prompts' in phase.collect:  # the same rows for all, however they are grouped
      rows = phase.collect.group * phase.collect.prompts
      phase.collect.prompts = phase.collect.prompts * prompts * 8 // rows
  return config


@functools.cache
def warm(seed: int) -> Params:
  """The parameters after the supervised phase that all experiments share."""
  config = load('grpo', seed, 1, 32)
  config.phases = {'sft': config.phases.sft}
  config.order = ('sft',)
  experiment = build.build(config)
  with jax.set_mesh(experiment.mesh):
    state = train.begin(experiment, 0, None)
    return jax.tree.map(np.asarray, train.run_phase(experiment, state, None, None).params)


def learn(name: str, seeds: Sequence[int], steps: int, prompts: int) -> Iterator[dict]:
  """Trains one method from the checkpoint of each seed; what to write down of it.

  This is the phase of `polgrad.train`, but the seeds share its compiled functions.
  """
  config = load(name, seeds[0], steps, prompts)
  last = config.order[-1]
  config.phases = {last: config.phases[last]}
  config.order = (last,)
  config.evaluation.every = 1  # to have an evaluator
  experiment = build.build(config)
  phase = experiment.phases[last]
  context = types.SimpleNamespace(**train.context(experiment, phase, 0)._asdict())
  with jax.set_mesh(experiment.mesh):
    first = train.begin(experiment, 0, None)
    collect = phase.collect.make(context)
    update = train.jit_update(experiment, phase, first)
    measure = evaluate.make_evaluator(experiment)
    accuracy = lambda state: measure(state.params)[0]['evaluation/greedy']
    # A value head is not in the checkpoint and begins fresh; updates take their state over.
    fresh = jax.tree.map(np.asarray, first.params)
    for seed in seeds:
      started = time.perf_counter()
      context.seed = seed
      params = sharding.replicate(experiment.mesh, {**fresh, **warm(seed)})
      state = train.begin(experiment, 0, first.replace(params=params, step=jnp.int32(0)))
      before, rewards, skipped = accuracy(state), [], 0
      for step in range(steps):
        draw = train.Drawer(phase, seed, int(state.cursor))
        collected = collect(state, draw, step)
        cuts = minibatches(
          collected.batch,
          epochs=phase.epochs,
          parts=phase.minibatches,
          group=phase.objective.group,
          seed=(seed, step),
        )
        for cut in cuts:
          state, report = update(state, sharding.place_batch(experiment.mesh, cut))
          skipped += int(report['skipped'] > 0)
        state = train.advance(experiment.mesh, state, collected, draw.cursor)
        rewards.append(collected.metrics.get('reward', float('nan')))
      yield {
        'method': name,
        'seed': seed,
        'steps': steps,
        'rows': phase.collect.rows,
        'before': before,
        'after': accuracy(state),
        'reward': [round(float(r), 3) for r in rewards],
        'skipped': skipped,
        'seconds': round(time.perf_counter() - started, 1),
      }


def done() -> set[tuple[str, int]]:
  if not RESULTS.exists():
    return set()
  return {(r['method'], r['seed']) for r in map(json.loads, RESULTS.read_text().splitlines())}


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
    seeds = [seed for seed in range(arguments.seeds) if (name, seed) not in done()]
    for row in learn(name, seeds, arguments.steps, arguments.prompts) if seeds else ():
      with RESULTS.open('a') as f:
        f.write(json.dumps(row) + '\n')
      print({k: v for k, v in row.items() if k != 'reward'}, flush=True)
  write_page()


def write_page() -> None:
  rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
  by_method = defaultdict(dict)
  for row in rows:
    by_method[row['method']][row['seed']] = row
  seeds = sorted({row['seed'] for row in rows})
  mean = lambda name: np.mean([r['after'] for r in by_method[name].values()])
  lines = [
    '# Learning: every policy-gradient experiment on one task',
    '',
    f'`python -m benchmarks.learning`: two-digit addition, {rows[0]["steps"]} collected batches of '
    f'{rows[0]["rows"]} rows from the supervised',
    'checkpoint of each seed, greedy accuracy on 400 held-out problems (standard error at most',
    '0.025). One learning rate for nearly all, none of them tuned: this shows that a method learns and',
    'does not fall apart, not which one is best.',
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
    lines.append(f'| `{name}` | {cells} | {mean(name):.2f} | {skipped:.0f} |')
  PAGE.write_text('\n'.join(lines) + '\n')


def _start(by_method: dict, seed: int) -> float:
  return next(rows[seed]['before'] for rows in by_method.values() if seed in rows)


if __name__ == '__main__':
  cache = pathlib.Path('~/.cache/polgrad/benchmarks').expanduser()
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  main()
