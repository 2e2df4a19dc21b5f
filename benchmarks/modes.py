"""What does each mode of asynchronous training save with a slow sampler, and what does it cost?

    python -m benchmarks.modes                         # all of it; resumes
    python -m benchmarks.modes --speed                 # only the speed
    python -m benchmarks.modes --lengths               # only the lengths of the rows of the first steps
    python -m benchmarks.modes --caches                # only what old caches change
    python -m benchmarks.modes offline mixed --seeds=3 # accuracy of some modes
    python -m benchmarks.modes --table                 # only writes the tables into docs/asynchronous.md

Speed: GRPO with the tiny model and random weights on eight devices of the host. A token in 14 ends a
completion, and 96 tokens do, so few rows are long. Draws of a token, and updates, wait on purpose, so
that the ratios depend little on what else the machine does. Modes that sample beside the updates have
four devices for each, the others eight for both. All modes are alive in one process. In a round each
makes some steps, one mode after the other, and a ratio is that of one round; the table has the median
and the range of the rounds. The learning rate is next to 0, so all sample from one policy.

Lengths: of the same policy, on one device, without updates. Batches of the first steps are collected
from several places of the data, each time from the beginning.

Caches: rows are drawn up to 12 tokens, the policy then makes some steps of GRPO with a reward of short
rows, and the new weights draw the rest, from caches that are filled anew or not. The divergence is the
k3 estimate of KL(sampled from || trainer's) in nats a token, the trainer having the new weights: of the
tokens that these have drawn, and of those before.

Accuracy: all modes of a seed begin with the same supervised checkpoint and make the same number of steps
on two-digit addition, on one device and without waits. Accuracy is that of greedy answers to 400
held-out problems.

Results are appended to docs/modes.jsonl.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hybrids, marks
from benchmarks.curricula import run
from polgrad import build, collect, phases, sharding, teacher_logp
from polgrad.collect import partial
from polgrad.compiling import jit
from polgrad.learner import forward_in_pieces
from polgrad.options import from_text
from polgrad.overrides import apply
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.sampling import resumable
from polgrad.sampling.decoding import Sampler
from polgrad.types import Params

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE = DOCS / 'modes.jsonl', DOCS / 'asynchronous.md'
IN_FLIGHT = dict(in_flight=32, batches_in_flight=2)
# Settings of the collector by mode, as texts of a command line.
MODES = {
  'synchronous': {},
  'partial rollouts': IN_FLIGHT,
  'one step off': dict(lag=1, overlap=True),
  'one step off, partial rollouts': dict(lag=1, overlap=True, **IN_FLIGHT),
  'fully asynchronous': dict(lag=2, overlap=True, chunk=4, **IN_FLIGHT),
  'mixed': dict(replay=4, replay_fraction=0.25),
  'offline': dict(name='Stored'),
}
# Seconds that a draw of a token waits, and an update.
WAITS = ((0.01, 0.25), (0.01, 0.0), (0.0, 0.0))
WARM_UP = 6  # steps of a mode before those that are timed: its queues are full then
# Settings of rows in flight whose lengths are measured.
BOUNDS = {
  'synchronous': {},
  **{
    f'in_flight=32, batches_in_flight={n}': dict(in_flight=32, batches_in_flight=n)
    for n in (1, 2, 4)
  },
}


class Waits:
  """Draws of all samplers that are traced within it wait for `seconds`, which may be changed."""

  def __init__(self):
    self.seconds = 0.0

  def __enter__(self) -> 'Waits':
    self._quick = quick = Sampler.distribution

    def wait(_) -> np.ndarray:
      time.sleep(self.seconds)
      return np.zeros((), np.float32)

    def distribution(sampler, params, hidden):
      log_probs = quick(sampler, params, hidden)
      # It reads a number of the draw, so that it is called in each and not once.
      late = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), log_probs.ravel()[0])
      return log_probs + late

    Sampler.distribution = distribution
    return self

  def __exit__(self, *_) -> None:
    Sampler.distribution = self._quick


def with_mode(config, mode: str, folder: str):
  """The configuration in this mode.

  Args:
    folder: of the completions that `offline` reads.
  """
  settings = MODES[mode] | (dict(path=folder) if mode == 'offline' else {})
  to = 'config.phases.train.collect'
  return apply(config, {f'{to}.{k}': str(v) for k, v in settings.items()}, build.TABLE)


def store(config, params: Params, folder: str) -> None:
  """Draws the completions of all records by these parameters, once, for `offline`."""
  config = with_mode(config, 'offline', folder)
  config.phases, config.order = {'train': config.phases.train}, ('train',)
  config.phases.train.collect.prompts = 64
  config.mesh.data = 1
  experiment = build.build(config)
  phase = teacher_logp.phase_of(experiment)
  with jax.set_mesh(experiment.mesh):
    teacher_logp.store(
      phase,
      experiment.tokenizer,
      teacher_logp.make_entries(experiment, phase, params, teacher_logp.own_score),
      vocab_size=experiment.policy.config.vocab_size,
      file_rows=len(phase.source),
      made_by={},
    )


class Alive:
  """A phase whose steps are made when they are asked for."""

  def __init__(self, config):
    config.phases, config.order = {'train': config.phases.train}, ('train',)
    self.experiment = build.build(config)
    with jax.set_mesh(self.experiment.mesh):
      self.begun = phases.begin(self.experiment, 0, None)
      self.run = phases.start_phase(self.experiment, self.begun, phases.Logs())
    self.restart(0)

  def restart(self, cursor: int) -> None:
    """Begins again, at another place of the data."""
    state = jax.tree.map(jnp.copy, self.begun)  # updates take the arrays over
    self.state, self.made = state.replace(cursor=np.int32(cursor)), 0

  def step(self, wait: float | None) -> collect.Collected:
    """Makes a step, whose update waits for some seconds; None: there is no update."""
    run = self.run
    with jax.set_mesh(self.experiment.mesh):
      draw = run.draw(self.state)
      collected = run.next_batch(self.state, draw, self.made)
      if wait is not None:
        time.sleep(wait)
        self.state, _ = run.update_all(self.state, collected.batch, self.made)
      collected = run.finished(collected, self.made)
      self.state = run.advance(self.state, collected, draw)
    self.made += 1
    return collected

  def steps(self, count: int, wait: float) -> tuple[float, float]:
    """Makes some steps; their mean seconds, and the mean age of their rows."""
    begun = time.perf_counter()
    ages = [self.step(wait).metrics['staleness'] for _ in range(count)]
    return (time.perf_counter() - begun) / count, statistics.mean(ages)


def load_slow(text: str = 'digits=1'):
  """The run whose speed and lengths are measured."""
  text = f'method=grpo,task=addition,{text},model=tiny,kl_coefficient=0,learning_rate=1e-12'
  config = from_text(f'{text},prompts=16,trackers=none')
  config.samples_every = config.checkpoint_every = config.rollouts.every = 0
  config.evaluation.every = config.show_samples = 0
  # Nearly uniform: a token in 14 ends a row, so half of the groups of 8 are over after 35 tokens.
  config.phases.train.collect.update(max_new_tokens=96, temperature=10.0)
  config.model.max_length = 128
  config.mesh.data = 1
  return config


def placed(mode: str, folder: str):
  """The run of a mode, with its devices out of eight."""
  config = with_mode(load_slow(), mode, folder)
  beside = 'overlap' in MODES[mode]
  config.mesh.data = 4 if beside else 8
  if beside:
    config.sampler_mesh = part(sharding.beside, data=4)
  return config


def speeds(modes: Sequence[str], waits: Sequence[tuple], rounds: int, steps: int) -> list[dict]:
  """For some waits: seconds of a step by mode and round, and the mean age of the rows."""
  with tempfile.TemporaryDirectory() as folder:
    if 'offline' in modes:
      config = load_slow()
      store(config, build.build(config).policy.init(jax.random.key(config.seed)), folder)
    alive = {mode: Alive(placed(mode, folder)) for mode in modes}
    results = []
    with Waits() as draws:
      for draws.seconds, updates in waits:
        seconds, ages = defaultdict(list), defaultdict(list)
        for number in range(rounds + 1):
          for mode, one in alive.items():
            took, age = one.steps(steps if number else WARM_UP, updates)
            print(f'{mode}, round {number}: {took:.3f} s a step', flush=True)
            if number:  # those before fill the queues, and compile
              seconds[mode].append(round(took, 4))
              ages[mode].append(age)
        means = {mode: round(statistics.mean(x), 3) for mode, x in ages.items()}
        found = dict(waits=[draws.seconds, updates], seconds=dict(seconds), ages=means)
        results.append(found)
  return results


def lengths(steps: int, places: int) -> dict:
  """The mean length of the rows of the first steps, by setting, with one policy throughout."""
  found = {}
  for name, settings in BOUNDS.items():
    config = load_slow('digits=2')
    config.phases.train.collect.update(settings)
    one, rows = Alive(config), []
    for place in range(places):
      one.restart(place * len(one.run.phase.source) // places)
      batches = [one.step(None).batch for _ in range(steps)]
      rows.append([float(batch.mask.sum(axis=1).mean()) for batch in batches])
    found[name] = np.mean(rows, axis=0).round(2).tolist()
    print(name, found[name], flush=True)
  return {'lengths': found, 'places': places}


@functools.cache
def warm(seed: int, warm_start: int) -> Params:
  """The parameters after the supervised phase that all modes of a seed share."""
  config = hybrids.load(hybrids.grpo, seed, 1, warm_start)
  config.evaluation.every = 0
  return run(config, 'warm_start', None)[0]


def accuracy(mode: str, seed: int, steps: int, warm_start: int) -> dict:
  """The accuracy before and after the steps of a mode."""
  config = hybrids.load(hybrids.grpo, seed, steps)
  config.evaluation.every = steps
  with tempfile.TemporaryDirectory() as folder:
    if mode == 'offline':
      store(config, warm(seed, warm_start), folder)
    _, found = run(with_mode(config, mode, folder), 'train', warm(seed, warm_start))
  measured = [row['evaluation/greedy'] for row in found if 'evaluation/greedy' in row]
  made = [row for row in found if 'loss' in row]
  return {
    'mode': mode,
    'seed': seed,
    'steps': steps,
    'before': measured[0],
    'after': measured[-1],
    'age': round(statistics.mean(row['staleness'] for row in made), 3),
    'kl': round(statistics.mean(row['sampler_kl'] for row in made[len(made) // 2 :]), 6),
  }


def caches(steps: Sequence[int]) -> dict:
  """By the number of steps between two pieces: divergences of the tokens, see `_divergences`."""
  config = load_slow('digits=2')
  config.phases.train.collect.update(max_new_tokens=48, temperature=1.0)
  config.phases.train.optimizer.learning_rate = hybrids.RATE
  with config.unlocked():
    short = part(verifiers.soft_overlong, max_length=24, cache=24)
    config.phases.train.reward.short = weighted(1.0, short)
  one = Alive(config)
  collectors = [
    dataclasses.replace(
      one.run.phase.collect, lag=1, overlap=True, chunk=12, refill=refill, **IN_FLIGHT
    )
    for refill in (True, False)
  ]
  found = []
  with jax.set_mesh(one.experiment.mesh):
    context = phases.context(one.experiment, one.run.phase, 0)
    samplers = [partial.make_in_flight_steps(x, context, x._parts(context)) for x in collectors]
    for made in steps:
      one.restart(0)
      rows = []
      for sampler in samplers:
        nothing, _ = sampler.settings.init()
        begun = sampler.filled(nothing, one.run.draw(one.state), 0)
        stop = lambda rows: True
        rows.append(sampler.drawn(begun, sampler.lent(one.state), number=0, version=0, stop=stop))
      for _ in range(made):
        one.step(0.0)
      drawn = [
        sampler.drawn(begun, sampler.lent(one.state), number=0, version=1)
        for sampler, begun in zip(samplers, rows)
      ]
      found.append([made, *_divergences(one, drawn[0]), _divergences(one, drawn[1])[0]])
      print(found[-1], flush=True)
  return {'caches': found}


def _divergences(one: Alive, rows: resumable.Rows) -> tuple[float, float]:
  """Of the tokens of version 1, and of those of version 0, from the log-probs of the trainer."""
  collector = one.run.phase.collect
  batch = partial.batch_of(rows, collector.samples_per_prompt, one.experiment.tokenizer.pad_id)
  forward = functools.partial(forward_in_pieces, temperature=collector.temperature)
  logp = jit(lambda params, batch: forward(one.experiment.policy, params, batch).logp)
  ratio = np.asarray(logp(one.state.params, batch) - batch.behavior_logp, np.float64)
  k3 = np.expm1(ratio) - ratio
  kinds = [batch.mask & (batch['versions'] == version) for version in (1, 0)]
  return tuple(float(f'{k3[kind].mean():.3g}') for kind in kinds)


def read() -> list[dict]:
  return marks.read(RESULTS)


def table(results: list[dict]) -> str:
  """A row a mode: how much faster its steps are, the age of its rows, and accuracy by seed."""
  speed = {tuple(one['waits']): one for one in results if 'waits' in one}  # the last of each
  by_mode = defaultdict(dict)
  for one in (x for x in results if 'mode' in x):
    by_mode[one['mode']][one['seed']] = one
  titles = [_waits(*waits) for waits in speed] + ['age of rows', 'accuracy', 'by seed']
  rows = []
  for mode in MODES:
    cells = [_faster(one['seconds'], mode) for one in speed.values()]
    cells.append(next((f'{one["ages"][mode]:.1f}' for one in speed.values()), ''))
    ends = [one['after'] for _, one in sorted(by_mode[mode].items())]
    cells += [f'{statistics.mean(ends):.3f}' if ends else '', ', '.join(f'{x:.3f}' for x in ends)]
    rows.append([mode, *cells])
  return marks.table(['mode', *titles], rows)


def _waits(draw: float, update: float) -> str:
  named = {'a draw': draw, 'an update': update}
  found = [f'{name} waits {1000 * x:g} ms' for name, x in named.items() if x]
  return f'faster, {" and ".join(found) or "no waits"}'


def _faster(seconds: dict, mode: str) -> str:
  """`1.53 x (1.18 to 1.56)`: synchronous seconds over those of the mode."""
  ratios = [a / b for a, b in zip(seconds['synchronous'], seconds[mode])]
  return f'{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})'


def table_of_lengths(results: list[dict]) -> str:
  """A row a setting: the mean length of the rows of the first steps."""
  measured = [one['lengths'] for one in results if 'lengths' in one]
  if not measured:
    return ''
  titles = [f'step {step + 1}' for step in range(len(measured[-1]['synchronous']))]
  rows = [[name, *(f'{x:.1f}' for x in found)] for name, found in measured[-1].items()]
  return marks.table(['rows', *titles], rows)


def table_of_caches(results: list[dict]) -> str:
  """A row a number of steps: divergences of the tokens that the old and the new weights have drawn."""
  measured = [one['caches'] for one in results if 'caches' in one]
  if not measured:
    return ''
  titles = ['steps', 'filled anew', 'old caches', 'tokens of the old weights']
  rows = [
    [steps, *(f'{x:.1e}' for x in (anew, old, before))] for steps, anew, before, old in measured[-1]
  ]
  return marks.table(titles, rows)


def with_tables(text: str, results: list[dict]) -> str:
  """The text of the page with all tables between their marks."""
  text = marks.with_table(text, 'caches', table_of_caches(results))
  text = marks.with_table(text, 'modes', table(results))
  return marks.with_table(text, 'lengths', table_of_lengths(results))


def keep(found: dict) -> None:
  print(found, flush=True)
  marks.append(RESULTS, found)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('modes', nargs='*', metavar='MODE', help=', '.join(MODES))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=40, help='of a run whose accuracy is measured')
  parser.add_argument('--warm_start', type=int, default=180)
  parser.add_argument('--rounds', type=int, default=5, help='of the speed')
  for one in ('speed', 'lengths', 'caches', 'table'):
    parser.add_argument(f'--{one}', action='store_true', help='only this')
  args = parser.parse_args()
  if unknown := {*args.modes} - MODES.keys():
    parser.error(f'unknown {sorted(unknown)}; valid: {list(MODES)}')
  everything = not (args.modes or args.speed or args.lengths or args.caches or args.table)
  jax.config.update('jax_num_cpu_devices', 8)
  if everything or args.speed:
    for found in speeds([*MODES], WAITS, args.rounds, steps=4):
      keep(found)
  if everything or args.lengths:
    keep(lengths(steps=6, places=8))
  if everything or args.caches:
    keep(caches((1, 4, 16)))
  if everything or args.modes:
    done = {(one['mode'], one['seed']) for one in read() if 'mode' in one}
    for seed in range(args.seeds):
      for mode in args.modes or MODES:
        if (mode, seed) not in done:
          keep(accuracy(mode, seed, args.steps, args.warm_start))
  print(table(read()), table_of_lengths(read()), table_of_caches(read()), sep='\n\n')
  PAGE.write_text(with_tables(PAGE.read_text(), read()))


if __name__ == '__main__':
  main()
