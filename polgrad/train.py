"""Trains: the main that runs all phases of an experiment, with logs and checkpoints.

    python -m polgrad.train --config=experiments/quickstart.py --workdir=runs/quickstart

The same command with the same workdir resumes from the last complete checkpoint, and gives bit for
bit the numbers of a run without interruption. Every process of a pod runs this same command.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, logging
from tqdm import tqdm

from polgrad import checkpoint, cli, evaluate, metrics, sharding
from polgrad.build import Experiment, Phase, build, check_data
from polgrad.collect import Collected, Context, minibatches
from polgrad.compiling import jit
from polgrad.data import stream
from polgrad.learner import Learner
from polgrad.models.policy import Policy, learned
from polgrad.packing import pack
from polgrad.types import Batch, Params, TrainState


def main(argv: list[str]) -> None:
  cli.start(argv)
  run(cli.CONFIG.value, cli.WORKDIR.value, cli.checkpoint_folder())


def run(config: ml_collections.ConfigDict, workdir: str, folder: str = '') -> TrainState:
  """Trains to the end of the last phase, from the last checkpoint if there is one.

  Args:
    workdir: a local folder for config.json, metrics and the report; only the first process writes it.
    folder: folder of the checkpoints, which all processes must reach; '': `workdir`/checkpoints.

  Returns:
    The state after the last step.

  Raises:
    ValueError, TypeError, FileNotFoundError: the configuration is refused, see `build`; or the
      checkpoint is of other phases or other arrays.
    FloatingPointError: `max_skipped` consecutive updates were skipped.
  """
  # Build everything, and leave a copy of the configuration with the run.
  experiment = build(config)
  check_data(experiment)
  os.makedirs(workdir, exist_ok=True)
  chief = jax.process_index() == 0
  if chief:
    with open(os.path.join(workdir, 'config.json'), 'w') as f:
      json.dump(json.loads(config.to_json_best_effort()), f, indent=2)

  # Resume or begin, then run the phases that are left.
  folder = folder or os.path.join(workdir, 'checkpoints')
  checkpoints = checkpoint.manager(folder, keep=experiment.keep_checkpoints)
  try:
    with jax.set_mesh(experiment.mesh):
      state = resume(experiment, checkpoints)
      writer = open_writer(experiment, state, workdir) if chief else None
      for index in range(int(state.phase), len(experiment.order)):
        if index > int(state.phase):
          state = begin(experiment, index, state)
        state = run_phase(experiment, state, checkpoints, writer)
  finally:
    checkpoints.close()  # waits for a save that has not finished

  if chief:
    writer.close()
    print(f'metrics, checkpoints and curves are in {workdir}; see {metrics.report(workdir)}')
  return state


def open_writer(experiment: Experiment, state: TrainState, workdir: str) -> metrics.Writer:
  """A writer that keeps the metrics up to this state, and drops those of later steps."""
  begun = int(state.phase) + (int(state.phase_step) > 0)
  return metrics.Writer(
    workdir,
    step=int(state.step),
    past=experiment.order[:begun],
    tensorboard=experiment.tensorboard,
  )


def resume(experiment: Experiment, checkpoints: Any) -> TrainState:
  """The state of the last complete checkpoint, or the initial state if there is none.

  Raises:
    ValueError: the checkpoint is of a run with other phases, or holds other arrays.
  """
  state = begin(experiment, 0, None)
  step = checkpoints.latest_step()
  if step is None:
    return state

  # The checkpoint is read into the shapes and shardings of the state at the start of its phase.
  meta = checkpoint.read_meta(checkpoints, step)
  if tuple(meta['order']) != experiment.order:
    raise ValueError(f'the checkpoint ran phases {meta["order"]}, not {experiment.order}')
  if meta['phase']:
    state = begin(experiment, meta['phase'], state)
  print(f'resuming from checkpoint {step}, in phase {experiment.order[meta["phase"]]}')

  # Parameters are stored apart from the rest of the state, see `checkpoint.TREES`.
  restore = functools.partial(checkpoint.restore, checkpoints, step)
  rest = restore('rest', state.replace(params=None))
  return rest.replace(params=restore('params', state.params))


def begin(experiment: Experiment, index: int, before: TrainState | None) -> TrainState:
  """The state at the start of phase number `index`: new optimizer state, and new anchors.

  Args:
    before: the state at the end of the phase before, whose parameters are taken over; None: the
      parameters are new.
  """
  phase = experiment.phases[experiment.order[index]]
  mesh = experiment.mesh
  fresh = functools.partial(init_params, experiment.policy, mesh, experiment.seed)
  params = fresh() if before is None else before.params
  trainable = learned(experiment.policy, params)

  # Anchors are copies of the policy, or models that the phase names.
  anchors = {
    name: init_params(phase.frozen[name], mesh, experiment.seed)
    if name in phase.frozen
    else jax.tree.map(jnp.copy, trainable)
    for name in phase.anchors
  }

  # Only then may the policy restart: its anchors are the policy of the phase before.
  if phase.restart and before is not None:
    params = fresh()
    trainable = learned(experiment.policy, params)

  # Counters, and the states of collector, credit and objective, are small and on every device.
  zero = np.zeros((), np.int32)
  small = sharding.replicate(
    mesh,
    dict(
      step=zero if before is None else sharding.to_host(before.step),
      phase=np.asarray(index, np.int32),
      phase_step=zero,
      update=zero,
      cursor=zero,
      skipped=zero,
      collect_state=phase.collect.init(),
      credit_state=phase.credit.init(),
      objective_state=phase.objective.init(),
    ),
  )
  return TrainState(
    params=params,
    opt_state=init_opt_state(phase.optimizer, mesh, trainable),
    anchors=anchors,
    **small,
  )


def init_params(policy: Policy, mesh: jax.sharding.Mesh, seed: int) -> Params:
  """Parameters, sharded over the mesh; random ones from the seed, or those of the policy's files."""
  shapes = policy.shapes()
  shardings = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
  return policy.init(jax.random.key(seed), shardings)


def init_opt_state(
  optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, params: Params
) -> Any:
  """The initial state of the optimizer, sharded as `opt_shardings` says."""
  return jit(optimizer.init, out_shardings=opt_shardings(optimizer, mesh, params))(params)


def opt_shardings(
  optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, params: Params
) -> Any:
  """Shardings of the optimizer's state: an array that belongs to a parameter is sharded like it.

  An array belongs to the parameter whose keys end its own path and whose shape it has; other arrays
  are replicated.

  Args:
    params: arrays, or `jax.ShapeDtypeStruct` with shardings.
  """
  keys = lambda path: tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
  places = {keys(path): p for path, p in jax.tree_util.tree_leaves_with_path(params)}
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def place(path, x):
    names = keys(path)
    owners = [places[names[i:]] for i in range(len(names)) if names[i:] in places]
    return owners[0].sharding if owners and owners[0].shape == x.shape else whole

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


@dataclasses.dataclass(frozen=True)
class PhaseRun:
  """A phase with its compiled functions; its methods are the steps that `run_phase` takes."""

  experiment: Experiment
  name: str
  phase: Phase
  seed: int  # seeds the phase's order of data, its samples and its minibatches
  collect: Callable[[TrainState, 'Drawer', int], Collected]  # the int is the number of the step
  update: Callable  # (state, batch) -> (state, metrics), see `jit_update`
  # params -> (metrics, samples) on held-out problems; None: the experiment has no evaluation.
  measure: Callable | None
  writer: metrics.Writer | None  # None in all processes but the first

  def due(self, every: int, step: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last step of the phase; `every` 0: never."""
    return every > 0 and (step % every == 0 or step == self.phase.steps)

  def update_all(
    self, state: TrainState, batch: Batch, step: int
  ) -> tuple[TrainState, list[dict[str, Any]]]:
    """One update on each minibatch of a collected batch: (new state, metrics of each update)."""
    phase, mesh = self.phase, self.experiment.mesh
    cuts = minibatches(
      batch,
      epochs=phase.epochs,
      parts=phase.minibatches,
      rows_per_prompt=phase.rows_per_prompt,
      seed=(self.seed, step),
    )
    reports = []
    for minibatch in cuts:
      minibatch = pack(
        minibatch,
        parts=phase.micro_batches,
        rows_per_prompt=phase.rows_per_prompt,
        data_parallel_size=sharding.data_parallel_size(mesh),
      )
      state, report = self.update(state, sharding.place_batch(mesh, minibatch))
      report = sharding.to_host(report)
      if minibatch.layout.pack:
        report['rows_forwarded'] = forwarded_fraction(minibatch, phase.micro_batches)
      stop_if_broken(report, self.experiment.max_skipped, self.name, step)
      reports.append(report)
    return state, reports

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """Held-out metrics if they are due after `step` batches, else {}; shows some samples."""
    if not self.due(self.experiment.evaluation.every, step):
      return {}
    found, samples = self.measure(state.params)
    if self.writer:
      title = f'{self.name}, step {step}: held out'
      metrics.show_samples(title, samples[: self.experiment.show_samples])
    return found

  def write(self, state: TrainState, values: dict[str, float]) -> None:
    """Appends a row to the run's metrics."""
    if self.writer:
      self.writer.write(int(state.step), self.name, values)

  def show(self, collected: Collected, step: int) -> None:
    """Prints some samples of the collected batch if they are due after `step` batches."""
    if self.writer and collected.samples and self.due(self.experiment.samples_every, step):
      title = f'{self.name}, step {step}'
      metrics.show_samples(title, collected.samples[: self.experiment.show_samples])


def start_phase(
  experiment: Experiment, state: TrainState, writer: metrics.Writer | None
) -> PhaseRun:
  """The phase that the state is in; compiles nothing yet."""
  name = experiment.order[int(state.phase)]
  phase = experiment.phases[name]
  made = context(experiment, phase, int(state.phase))
  return PhaseRun(
    experiment=experiment,
    name=name,
    phase=phase,
    seed=made.seed,
    collect=phase.collect.make(made),
    update=jit_update(experiment, phase, state),
    measure=evaluate.make_evaluator(experiment) if experiment.evaluation.every else None,
    writer=writer,
  )


def run_phase(
  experiment: Experiment, state: TrainState, checkpoints: Any, writer: metrics.Writer | None
) -> TrainState:
  """Trains from the state until its phase has made all steps; a step collects and uses one batch."""
  run = start_phase(experiment, state, writer)
  first, last = int(state.phase_step), run.phase.steps
  bar = tqdm(total=last, initial=first, desc=run.name, disable=writer is None, mininterval=1.0)

  # A phase is also measured before its first step.
  if first == 0 and (found := run.evaluate(state, 0)):
    run.write(state, found)

  for step in range(first, last):
    started = time.perf_counter()

    # Draw records, and collect a batch from them.
    draw = Drawer(run.phase, run.seed, int(state.cursor))
    collected = run.collect(state, draw, step)
    for message in collected.messages:
      logging.warning('verifier: %s', message)

    # Update on each minibatch, then count the batch as used.
    state, reports = run.update_all(state, collected.batch, step)
    state = advance(experiment.mesh, state, collected, draw.cursor)

    # Evaluate and report. The time of a step is without its evaluation.
    row = summary(reports, collected, time.perf_counter() - started)
    found = run.evaluate(state, step + 1)
    bar.update()
    bar.set_postfix_str(postfix(row))
    if found or run.due(experiment.log_every, step + 1):
      run.write(state, row | found)
    run.show(collected, step + 1)

    if run.due(experiment.checkpoint_every, step + 1):
      save(experiment, checkpoints, state)
  bar.close()
  return state


class Drawer:
  """Draws the next records of a phase's stream; `cursor` is the position after the last of them."""

  def __init__(self, phase: Phase, seed: int, cursor: int):
    self.phase, self.seed, self.cursor = phase, seed, cursor

  def __call__(self, count: int) -> list[dict]:
    at, self.cursor = self.cursor, self.cursor + count
    return stream.records(
      self.phase.source, seed=self.seed, cursor=at, count=count, shuffle=self.phase.shuffle
    )


def context(experiment: Experiment, phase: Phase, index: int) -> Context:
  """What the collector of phase number `index` reads of the run."""
  return Context(
    policy=experiment.policy,
    tokenizer=experiment.tokenizer,
    mesh=experiment.mesh,
    seed=experiment.seed + 1_000_003 * index,  # phases draw other data and samples
    objective=phase.objective,
    credit=phase.credit,
    score=phase.score,
    frozen=phase.frozen,
    micro_batches=phase.micro_batches,
    layout=phase.layout,
  )


def jit_update(experiment: Experiment, phase: Phase, state: TrainState) -> Callable:
  """`Learner.update` of the phase, compiled.

  It donates the state that it is given, and shards the new state in the same way.
  """
  learner = Learner(
    experiment.policy,
    phase.objective,
    phase.optimizer,
    temperature=phase.collect.temperature,
    micro_batches=phase.micro_batches,
    anchors=phase.anchors,
    frozen=phase.frozen,
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jit(learner.update, donate_argnums=0, out_shardings=(shardings, None))


def advance(
  mesh: jax.sharding.Mesh, state: TrainState, collected: Collected, cursor: int
) -> TrainState:
  """The state after a collected batch was used: it is counted, and its new states are taken over.

  Args:
    cursor: position of the phase's stream after the records of the batch.
  """
  moved = dict(
    phase_step=np.asarray(int(state.phase_step) + 1, np.int32),
    cursor=np.asarray(cursor, np.int32),
    collect_state=collected.collect_state,
    credit_state=collected.credit_state,
  )
  return state.replace(**sharding.replicate(mesh, moved))


def forwarded_fraction(minibatch: Batch, micro_batches: int) -> float:
  """Rows that the model forwards, as a fraction of the rows of a minibatch; 1 where none are packed."""
  rows = len(minibatch.tokens)
  return (minibatch.layout.rows * micro_batches or rows) / rows


def stop_if_broken(report: dict[str, Any], limit: int, phase: str, step: int) -> None:
  """Warns if the update was skipped.

  Raises:
    FloatingPointError: it is the `limit`-th of consecutive skipped updates.
  """
  skipped = int(report['skipped'])
  if not skipped:
    return
  logging.warning(
    '%s, step %d: loss %s, gradient norm %s: update skipped (%d in a row)',
    phase, step, report['loss'], report['grad_norm'], skipped,
  )  # fmt: skip
  if skipped >= limit:
    raise FloatingPointError(
      f'{phase}, step {step}: {skipped} updates in a row had a loss or gradient that is not '
      'finite; parameters are those before the first of them, and the last checkpoint is whole'
    )


def summary(reports: list[dict], collected: Collected, seconds: float) -> dict[str, float]:
  """The metrics of one step.

  These are the means over its updates (`skipped` is a number of updates), the metrics of the collected
  batch, and the speed in tokens of the mask per second.
  """
  average = {k: float(np.mean([r[k] for r in reports])) for k in reports[0]}
  average['skipped'] = float(sum(r['skipped'] > 0 for r in reports))
  tokens = float(np.sum(collected.batch.mask))
  return average | collected.metrics | {'seconds': seconds, 'tokens_per_second': tokens / seconds}


# Metrics of the progress bar, and their short names.
SHOWN = {
  'reward': 'reward',
  'loss': 'loss',
  'kl': 'kl',
  'sampler_kl': 'sampler_kl',
  'entropy': 'entropy',
  'length': 'length',
  'tokens_per_second': 'tok/s',
}


def postfix(row: dict[str, float]) -> str:
  return ' '.join(f'{short} {row[name]:.3g}' for name, short in SHOWN.items() if name in row)


def save(experiment: Experiment, checkpoints: Any, state: TrainState) -> None:
  """Starts writing a checkpoint, numbered by the updates of all phases."""
  meta = {'order': list(experiment.order), 'phase': int(state.phase)}
  trees = {'params': state.params, 'rest': state.replace(params=None)}
  checkpoint.save(checkpoints, int(state.step), trees, meta)


if __name__ == '__main__':
  app.run(main)
