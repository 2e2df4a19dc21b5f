"""Kills runs at random instants, resumes them until they end, and compares every bit.

    nice -n 10 python -m benchmarks.kills --runs=200

`--runs` is the number of kills, spread evenly over the runs of `RUNS`. A run is a few steps of the tiny
model with a checkpoint after each. It is killed, resumed and killed again until it ends; then the arrays
of its last checkpoint and its rows of metrics (without times) are compared with those of a run that was
never killed. Most kills are SIGKILL. The others are SIGTERM, at which a run saves after its step and
ends (`polgrad.preemption`); SIGKILL follows if a process is still there after `ENDS_S` seconds. A
quarter of the kills is aimed at an instant drawn evenly from the length of a run, a quarter soon after a
step, a quarter in the middle of a save, and a quarter while a resumed run begins.

    python -m polgrad.train --config=benchmarks/kills.py:phases --workdir=/tmp/run   # one of the runs

Processes are forked from this one, which has imported everything but never starts JAX, so that a run
begins in a second or two.
"""

import argparse
import collections
import dataclasses
import functools
import json
import mmap
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

from ml_collections import ConfigDict

from benchmarks import robustness
from benchmarks.robustness import PLACES
from polgrad import checkpoint, cli, environments, metrics, optim, preemption, row_files
from polgrad.losses import ratios
from polgrad.options import from_text
from polgrad.phases import PhaseRun
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers

TEXT = 'task=addition,model=tiny,warm_start=0,smoke'
LIMIT_S = 300.0  # seconds after which a run counts as hanging
ENDS_S = 3.0  # seconds from SIGTERM to SIGKILL
# Indices of `PLACES`.
BEGIN, STEP, SAVE, END = range(len(PLACES))


def get_config(name: str) -> ConfigDict:
  """The configuration of a run of `RUNS`: `--config` reads this function."""
  config = RUNS[name]()
  with config.unlocked():
    config.checkpoint_every = 1
    config.trackers = {}
    config.show_samples = 0
    model = config.model.base if name == 'lora' else config.model
    model.num_layers = 1
    config.evaluation.every = 3 if name == 'phases' else 0
    for phase in config.phases.values() if name not in ('episodes', 'waiting') else ():
      # Random weights seldom add correctly; a reward of short answers gives them something to learn.
      phase.reward.short = weighted(1.0, part(verifiers.soft_overlong, max_length=5, cache=4))
  return config


def phases() -> ConfigDict:
  """Supervised, then policy gradient with epochs, minibatches and an anchor that follows the policy."""
  config = from_text('method=grpo,task=addition,model=tiny,smoke')
  with config.unlocked():
    config.phases.warm_start.steps = 4
    config.phases.train.steps = 5
    config.phases.train.update(epochs=2, minibatches=2)
    config.phases.train.anchors.reference = part(optim.ema, decay=0.9)
  return config


def replay() -> ConfigDict:
  """Rollouts that are one step old, mixed with replayed ones."""
  config = from_text(f'method=grpo,{TEXT}')
  config.phases.train.steps = 8
  config.phases.train.collect.update(lag=1, replay=2, replay_fraction=0.5)
  return config


def adaptive() -> ConfigDict:
  """An objective with a state, and a variance-reduced optimizer whose state holds parameters too."""
  config = from_text(f'method=epo,{TEXT}')
  with config.unlocked():
    config.phases.train.steps = 8
    config.phases.train.optimizer = part(optim.normalized_igt, learning_rate=0.01)
    config.phases.train.anchors.reference = part(optim.sync, every=3)
  return config


def lora() -> ConfigDict:
  """A trained adapter on a frozen base."""
  config = from_text(f'method=grpo,lora=4,{TEXT}')
  config.phases.train.steps = 8
  return config


def experts() -> ConfigDict:
  """A mixture of experts whose router balances its load."""
  config = from_text(f'method=grpo,{TEXT}')
  config.phases.train.steps = 8
  config.model.update(num_experts=4, balance_rate=0.01)
  return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(environments.Guess):
  """A guessing game in separate processes, whose answers take a time that depends on no seed."""

  IN_PROCESS = False

  def step(self, state, text):
    time.sleep(0.05 * random.SystemRandom().random())
    return super().step(state, text)


def episodes() -> ConfigDict:
  """Rollouts of several turns beside the updates, with an environment in separate processes."""
  config = from_text('method=grpo,task=guess,model=tiny,warm_start=0,smoke')
  config.phases.train.steps = 8
  config.phases.train.collect.update(lag=1, overlap=True)
  config.phases.train.collect.environment = part(Late, max_turns=3)
  return config


def in_flight() -> ConfigDict:
  """Rows that continue over updates, sampled beside them, with importance weights by age."""
  config = from_text(f'method=a3po,{TEXT}')
  config.phases.train.steps = 8
  config.phases.train.collect.update(lag=2, overlap=True, in_flight=8)
  config.phases.train.objective.proximal = part(ratios.interpolated_by_token)
  return config


def interrupted() -> ConfigDict:
  """The same, interrupted by updates: its numbers depend on speed, but each row is trained on once."""
  config = in_flight()
  config.phases.train.collect.update(chunk=2, weights_every=2, refill=False)
  with config.unlocked():
    config.rollouts.update(every=1, rows=1024)
  return config


def distributed() -> ConfigDict:
  """Two processes, each with half of the parameters and of the moments."""
  config = from_text(f'method=grpo,{TEXT}')
  config.phases.train.steps = 6
  config.mesh.update(data=1, fsdp=2)
  return config


def waiting() -> ConfigDict:
  """Answers of unsolved prompts that wait for further updates, which have their own moments."""
  config = from_text(f'method=relift,imitated=6,{TEXT}')
  config.phases.train.steps = 8
  return config


ONE_PROCESS = (phases, replay, adaptive, lora, experts, episodes, waiting, in_flight, interrupted)
RUNS = {f.__name__: f for f in (*ONE_PROCESS, distributed)}


# ---- In the processes that train ----


def child(
  name: str, folder: pathlib.Path, cache: str, mark: mmap.mmap, rank: int, port: int
) -> None:
  """Trains as `python -m polgrad.train` would, and writes into `mark` where it is (see `PLACES`)."""
  with (folder / f'log{rank}').open('ab') as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
  report_places(mark)
  keep_programs()
  sys.argv = [
    'train',
    f'--config={__file__}:{name}',
    f'--workdir={folder / ("run" if rank == 0 else f"other{rank}")}',
    f'--checkpoints={folder / "checkpoints"}',
    f'--compilation_cache={cache}',
  ]
  if name == 'distributed':
    import jax

    start = jax.distributed.initialize
    jax.distributed.initialize = lambda: start(f'localhost:{port}', 2, rank)
    sys.argv.append('--distributed')
  from polgrad import train

  cli.run(train.main)


def report_places(mark: mmap.mmap) -> None:
  """Wraps functions of the trainer, so that `mark[0]` says where the process is (index of `PLACES`)."""
  from polgrad import train

  update, save = PhaseRun.update_all, train.save

  def updating(self, state, batch, step, *further):
    mark[0] = STEP
    return update(self, state, batch, step, *further)

  def saving(experiment, checkpoints, identity, state, **more):
    mark[0] = SAVE
    save(experiment, checkpoints, identity, state, **more)
    last = len(experiment.order) - 1
    ended = int(state.phase) == last
    ended = ended and int(state.phase_step) >= experiment.phases[experiment.order[last]].steps
    mark[0] = END if ended else STEP

  PhaseRun.update_all, train.save = updating, saving


def keep_programs() -> None:
  """Lets the compilation cache keep programs that compile quickly too: all of these do."""
  import jax

  start = cli.start

  def starting(*args, **kwargs):
    start(*args, **kwargs)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

  cli.start = starting


def fork(function: Callable[[], None]) -> int:
  """Runs a function in a new process, and returns the id of the process."""
  sys.stdout.flush()
  process = os.fork()
  if process:
    return process
  code = 1
  try:
    function()
    code = 0
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- In the process that kills ----


class Trial:
  """One run in one folder, which can be started, killed and started again."""

  def __init__(self, name: str, folder: pathlib.Path, cache: str):
    self.name, self.folder, self.cache = name, folder, cache
    self.mark = mmap.mmap(-1, 1)  # memory that the first process shares with this one
    self.processes: list[int] = []
    self.codes: dict[int, int] = {}  # exit codes of the processes that have ended

  def start(self) -> None:
    """Starts all processes of the run."""
    self.mark[0] = BEGIN
    self.left = self.temporary()  # what an earlier kill left behind
    self.codes = {}
    self.began = time.monotonic()
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    marks = [self.mark, mmap.mmap(-1, 1)]
    ranks = range(2 if self.name == 'distributed' else 1)
    self.processes = [
      fork(functools.partial(child, self.name, self.folder, self.cache, marks[rank], rank, port))
      for rank in ranks
    ]

  def running(self) -> bool:
    """Whether no process has ended."""
    for process in self.processes:
      if process not in self.codes:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
          self.codes[process] = os.waitstatus_to_exitcode(status)
    return not self.codes

  def temporary(self) -> set[tuple]:
    """The folders with a temporary name, which is what a checkpoint has while it is written."""
    try:
      with os.scandir(self.folder / 'checkpoints') as found:
        return {(f.name, f.inode(), f.stat().st_ctime_ns) for f in found if 'tmp' in f.name}
    except FileNotFoundError:  # there are no checkpoints yet, or one was renamed just now
      return set()

  def saving(self) -> bool:
    """Whether a checkpoint is being written; folders that an earlier kill left behind do not count."""
    return self.mark[0] != BEGIN and bool(self.temporary() - self.left)

  def rows(self) -> int:
    """Bytes of metrics, which grow with every step."""
    try:
      return os.path.getsize(self.folder / 'run' / 'metrics.jsonl')
    except FileNotFoundError:
      return 0

  def kill(self, first: int, signal_: int) -> str:
    """Kills process number `first`, then the others, as in a restart of a pod; returns where it was."""
    where = SAVE if self.saving() else self.mark[0]
    order = [self.processes[first], *(p for i, p in enumerate(self.processes) if i != first)]
    for process in order:
      if process not in self.codes:
        os.kill(process, signal_)
        deadline = time.monotonic() + ENDS_S
        while signal_ != signal.SIGKILL and self.alive(process) and time.monotonic() < deadline:
          time.sleep(0.01)
        # At SIGTERM a process that has begun saves, or was at its end. One of two may instead fail
        # because the other is gone.
        heeded = self.codes.get(process, 0) in (0, preemption.CODE)
        if signal_ == signal.SIGTERM and len(order) == 1 and where != BEGIN and not heeded:
          raise AssertionError(f'{self.name} ended with {self.codes} at SIGTERM in {self.folder}')
        if self.alive(process):
          os.kill(process, signal.SIGKILL)
          self.codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return PLACES[where]

  def alive(self, process: int) -> bool:
    self.running()
    return process not in self.codes

  def wait(self) -> None:
    """Waits until all processes have ended.

    Raises:
      AssertionError: a process failed, or the run took more than `LIMIT_S` seconds.
    """
    while len(self.codes) < len(self.processes):
      self.running()
      if time.monotonic() - self.began > LIMIT_S or any(self.codes.values()):
        self.kill(0, signal.SIGKILL)
        break
      time.sleep(0.01)
    if any(self.codes.values()):
      log = (self.folder / 'log0').read_text(errors='replace')[-3000:]
      raise AssertionError(f'{self.name} in {self.folder} ended with {self.codes}: {log}')


def kill_once(trial: Trial, how: str, length_s: float, draw: random.Random) -> str | None:
  """Starts the run and kills it; returns where it was (of `PLACES`), or None if it ended before.

  Args:
    how: 'any' instant, soon after a 'step', within a 'save', or at the 'begin'.
    length_s: seconds of a whole run.
  """
  trial.start()
  first = trial.rows()
  skip = draw.randrange(3)  # number of saves or steps to let pass
  delay = {
    'any': draw.uniform(0, length_s),
    'begin': draw.uniform(0, length_s / 3),
    'step': draw.uniform(0, 0.3),
    'save': draw.choice([0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.1)]),
  }[how]
  # Wait for the step or save that the kill is aimed at, then for the delay.
  was_saving = False
  while how in ('step', 'save') and trial.running():
    if how == 'step' and trial.rows() != first:
      first, skip = trial.rows(), skip - 1
    if how == 'save':
      now = trial.saving()
      skip -= now and not was_saving
      was_saving = now
    if skip < 0:
      break
    time.sleep(0.0005 if how == 'save' else 0.005)
  until = time.monotonic() + delay
  while trial.running() and time.monotonic() < until:
    time.sleep(max(min(until - time.monotonic(), 0.01), 0))
  if not trial.running() and not any(trial.codes.values()):
    trial.wait()
    return None
  if trial.codes:
    trial.wait()  # a process failed by itself, which is an error

  # About one kill in seven is SIGTERM.
  signal_ = signal.SIGTERM if draw.random() < 0.15 else signal.SIGKILL
  return trial.kill(draw.randrange(len(trial.processes)), signal_)


def rows_of(folder: pathlib.Path) -> list[dict]:
  """The rows of metrics, without times."""
  found = metrics.read(str(folder / 'run' / 'metrics.jsonl'))
  return [{k: v for k, v in row.items() if 'second' not in k} for row in found]


def last_checkpoint(folder: pathlib.Path) -> dict:
  """The arrays of the last checkpoint by their paths; in a process that may start JAX."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  stored = checkpoint.manager(str(folder / 'checkpoints'))
  step = stored.latest_step()
  like = stored.item_metadata(step)
  args = {}
  for name in checkpoint.TREES:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda x, s=device: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    args[name] = ocp.args.StandardRestore(jax.tree.map(shape, like[name].tree))
  found = stored.restore(step, args=ocp.args.Composite(**args))
  found = {n: jax.tree_util.tree_leaves_with_path(found[n]) for n in checkpoint.TREES}
  stored.close()
  return {
    f'{n}{jax.tree_util.keystr(path)}': np.asarray(x) for n, xs in found.items() for path, x in xs
  } | {'step': np.asarray(step)}


def asked(function: Callable[[], dict], killed: pathlib.Path) -> dict:
  """What a function says in another process, because this one never starts JAX."""
  out = killed / 'asked.json'
  if os.waitpid(fork(lambda: out.write_text(json.dumps(function()))), 0)[1]:
    raise AssertionError(f'the checkpoints of {killed} cannot be read')
  return json.loads(out.read_text())


def differing(whole: pathlib.Path, killed: pathlib.Path) -> tuple[list[str], int]:
  """The arrays of the last checkpoints that differ in a bit, and the number of all arrays."""

  def compare() -> dict:
    a, b = last_checkpoint(whole), last_checkpoint(killed)
    bits = lambda x: (x.shape, str(x.dtype), x.tobytes())
    odd = [
      k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or bits(a[k]) != bits(b[k])
    ]
    return {'odd': odd, 'arrays': len(a)}

  found = asked(compare, killed)
  return found['odd'], found['arrays']


def miscounted(whole: pathlib.Path, killed: pathlib.Path) -> tuple[list[str], int]:
  """Prompts that were lost or trained on twice, and the number of all that the run has drawn.

  Of a run whose source has more records than it draws, so that no prompt is drawn twice.
  """
  del whole

  def count() -> dict:
    state = last_checkpoint(killed)
    of = lambda name: state[next(key for key in state if key.endswith(name))]
    memory, rows = "['memory']['batches']['prompt_ids']", "['rows']['prompt_ids']"
    ring, begun = of(memory), of("['rows']['begun']")
    used, made = int(of("['phase_step']")), int(of("['memory']['count']"))
    ids = [ring[n % len(ring)] for n in range(used, made)]
    ids += [of(rows)[begun >= 0]]
    files = row_files.files(str(killed / 'run'), row_files.ROLLOUTS)
    ids += [[row['prompt_ids'] for row in row_files.read(file).rows] for file in files]
    found = collections.Counter(int(i) for some in ids for i in some)
    samples = min(found.values())  # of a prompt; more of them are a prompt that came twice
    odd = [f'prompt {i}' for i, n in found.items() if n != samples]
    missing = int(of("['cursor']")) - len(found)
    return {'odd': odd + ['a prompt'] * abs(missing), 'arrays': len(found)}

  found = asked(count, killed)
  return found['odd'], found['arrays']


# Runs whose numbers depend on speed: what is compared instead of every bit.
COMPARED = {'interrupted': miscounted}


def campaign(name: str, kills: int, place: pathlib.Path, draw: random.Random) -> dict:
  """Kills runs of one kind until there were `kills` of them, and compares each run that has ended.

  Args:
    name: of `RUNS`.
    place: a folder for the runs; those without a difference are deleted.

  Returns:
    places, aims: number of kills by where the run was, and by what they were aimed at.
    runs, compared: number of runs, and of arrays that were compared.
    arrays, rows: number of arrays and of rows of metrics that differ.
    length_s: seconds of a run that is not killed.
  """
  # A run that is not killed, twice: the first fills the cache of programs, the second is timed.
  cache = str(place / 'programs')
  whole = place / name / 'whole'
  whole.mkdir(parents=True)
  length_s = 0.0
  for _ in range(2):
    shutil.rmtree(whole)
    whole.mkdir()
    trial = Trial(name, whole, cache)
    trial.start()
    trial.wait()
    length_s = time.monotonic() - trial.began

  # Runs that are killed until they end. The last is let run to its end.
  places, aims, arrays = collections.Counter(), collections.Counter(), []
  compared = odd_rows = runs = 0
  ways = ['any', 'save', 'step', 'begin']
  while places.total() < kills:
    folder = place / name / f'killed{runs}'
    folder.mkdir()
    trial, ended = Trial(name, folder, cache), False
    while not ended and places.total() < kills:
      how = ways[draw.randrange(4)]
      where = kill_once(trial, how, length_s, draw)
      ended = where is None
      if not ended:
        places[where] += 1
        aims[how] += 1
    if not ended:
      trial.start()
      trial.wait()
    runs += 1

    # Compare with the run that was not killed.
    odd, count = COMPARED.get(name, differing)(whole, folder)
    arrays, compared = arrays + odd, compared + count
    if name not in COMPARED:
      odd_rows += sum(a != b for a, b in zip(rows_of(whole), rows_of(folder)))
    odd_rows += abs(len(rows_of(whole)) - len(rows_of(folder)))
    print(f'{name}: {places.total()} kills, {runs} runs, {odd[:3]}, {odd_rows} rows', flush=True)
    if not odd:
      shutil.rmtree(folder)
  return {
    'places': dict(places), 'aims': dict(aims), 'runs': runs, 'compared': compared,
    'arrays': len(arrays), 'rows': odd_rows, 'length_s': round(length_s, 1),
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--runs', type=int, default=200, help='kills, in all')
  parser.add_argument('--kinds', nargs='*', default=list(RUNS))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--record', action='store_true', help='keep the results in docs/')
  args = parser.parse_args()
  from polgrad import train  # noqa: F401, so that the processes that are forked have imported it

  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  each, found = -(-args.runs // len(args.kinds)), {}
  with tempfile.TemporaryDirectory(prefix='kills') as place:
    for name in args.kinds:
      begun = time.monotonic()
      draw = random.Random(f'{args.seed} {name}')
      found[name] = campaign(name, each, pathlib.Path(place), draw)
      print(f'{name}: {found[name]} in {time.monotonic() - begun:.0f} s', flush=True)
      if args.record:
        robustness.record('kills', {name: {'seed': args.seed, **found[name]}})
  odd = sum(row['arrays'] + row['rows'] for row in found.values())
  raise SystemExit(f'{odd} differences' if odd else 0)


if __name__ == '__main__':
  main()
