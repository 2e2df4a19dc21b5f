"""The steps of a phase: collect a batch, update on its minibatches, measure, report, keep the state."""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from tqdm import tqdm

from polgrad import (
  barriers,
  curricula,
  evaluate,
  exchanges,
  metrics,
  preemption,
  row_files,
  sharding,
  speed,
)
from polgrad.build import Experiment, Phase
from polgrad.checks import tracing
from polgrad.collect import Collected, minibatches, responses
from polgrad.compiling import Program, is_quick, jit
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.evaluate import context, init_params
from polgrad.learner import EMPTY, AnchorLearner, Learner, NetworkLearner, parameter_sets
from polgrad.models.policy import learned
from polgrad.packing import pack
from polgrad.progress import Progress
from polgrad.registry import suggest
from polgrad.types import PLAIN, Array, Batch, Params, TrainState


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

  # Counters, and the states of collector, credit, objective and curriculum, are on every device.
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
      curriculum_state=phase.curriculum.init(phase.source),
    ),
  )
  init = lambda optimizer, params: init_opt_state(optimizer, mesh, params)
  learners = phase.anchor_learners(experiment.policy)
  key = jax.random.fold_in(jax.random.key(experiment.seed), index)
  networks = {}
  for i, (name, one) in enumerate(sorted(phase.network_learners(experiment.policy).items())):
    random = one.network.init(jax.random.fold_in(key, i), one.policy.config.width)
    networks[name] = one.init(sharding.replicate(mesh, sharding.to_host(random)), init)
    networks[name]['skipped'] = sharding.replicate(mesh, zero)
  further = phase.further_learners(experiment.policy)
  return TrainState(
    params=params,
    opt_state=init(phase.optimizer, trainable),
    anchors=anchors,
    learned={name: one.init(anchors[name], init) for name, one in learners.items()}
    | {name: one.init(trainable, init) for name, one in further.items()},
    networks=networks,
    responses=begin_responses(phase),
    **small,
  )


def begin_responses(phase: Phase) -> responses.Responses | tuple:
  """An empty store of responses, if the curriculum of the phase reads `drift`; else ()."""
  if 'drift' not in phase.curriculum.reads:
    return ()
  return responses.empty(len(phase.source), phase.collect.length)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs:
  """Where a phase leaves what is not in its state."""

  writer: metrics.Writer | None = None  # of metrics; None in all processes but the first
  store: row_files.Store | None = None  # of rows; None too where no rows are kept
  progress: Progress = dataclasses.field(default_factory=Progress)  # changed in place
  profiler: speed.Profiler = dataclasses.field(default_factory=speed.Profiler)


@dataclasses.dataclass(frozen=True)
class PhaseRun:
  """A phase with its compiled functions; its methods are the steps that `run_phase` takes."""

  experiment: Experiment
  name: str
  phase: Phase
  seed: int  # seeds the phase's order of data, its samples and its minibatches
  collect: Callable[[TrainState, 'Drawer', int], Collected]  # the int is the number of the step
  update: 'Update'  # (state, batch) -> (state, metrics)
  learn: dict[str, Callable]  # the same of the anchors that learn, by name
  networks: dict[str, Callable]  # the same of the networks that score hidden states, by name
  more: dict[str, Callable]  # the same of further updates of the policy, by name
  # params -> (metrics, samples) on held-out problems; None: the experiment has no evaluation.
  measure: Callable | None
  measure_rows: Callable  # state -> metrics on held-out records of the phase
  logs: Logs
  # (state of the curriculum, what it observes) -> its next state
  observe: Callable = lambda state, found: state
  categories: tuple[str, ...] = ()  # names of what the curriculum reports
  recall: responses.Recall | None = None  # measures `drift`; None: the curriculum does not read it

  def prepare(self, state: TrainState) -> None:
    """What comes before the steps: begins what they wait for, and evaluates before the first step."""
    self.work_ahead(state)
    if int(state.phase_step) == 0 and (found := self.evaluate(state, 0)):
      self.improved(state, found)  # only looks whether there is such a metric
      self.write(state, found)

  def work_ahead(self, state: TrainState) -> None:
    """Begins in the background what the first step waits for, if a step is left.

    Processes of verifiers and of the environment start, and the policy's update compiles while the first
    batch is collected, which compiles the programs of the sampler. The update is not compiled where rows
    are packed, since the shapes of a batch then depend on its rows.
    """
    if int(state.phase_step) >= self.phase.steps:
      return
    self.phase.begin()
    if not self.phase.layout.pack and not is_quick():
      self.update.ahead(state, self.phase, self.experiment.mesh)

  def due(self, every: int, step: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last step of the phase; `every` 0: never."""
    return every > 0 and (step % every == 0 or step == self.phase.steps)

  def draw(self, state: TrainState) -> 'Drawer':
    """What draws the records of the next step."""
    return Drawer(
      self.phase,
      self.seed,
      int(state.cursor),
      self.experiment.tokenizer,
      sharding.to_host(state.curriculum_state),
    )

  def advance(self, state: TrainState, collected: Collected, draw: 'Drawer') -> TrainState:
    """The state after a collected batch was used; the curriculum observes what became of its rows.

    If it reads `drift`, that is measured under the policy after the updates, and is a metric.
    """
    drift = None
    if self.recall is not None:
      meter = speed.Meter()
      drift, kept = self.recall(state, collected.batch, meter)
      state = state.replace(responses=kept)
      collected.metrics.update({'drift': float(np.mean(drift)), **meter.take()})
    curriculum_state = draw.curriculum_state
    if jax.tree.leaves(curriculum_state):
      seen = self.phase.source, self.phase.curriculum.embed
      found = curricula.observed(collected.batch, collected.sampled, drift, *seen)
      curriculum_state = sharding.to_host(self.observe(curriculum_state, found))
    return advance(self.experiment.mesh, state, collected, draw.cursor, curriculum_state)

  def curriculum(self, state: TrainState) -> dict[str, float]:
    """What the curriculum reports, as metrics `curriculum/...`."""
    found = {}
    for name, x in self.phase.curriculum.report(sharding.to_host(state.curriculum_state)).items():
      if np.ndim(x):
        entries = zip(self.categories, x, strict=True)
        found |= {f'curriculum/{name}/{key}': float(value) for key, value in entries}
      else:
        found[f'curriculum/{name}'] = float(x)
    return found

  def next_batch(self, state: TrainState, draw: 'Drawer', step: int) -> Collected:
    """The batch of a step, of which `finished` gives the rest.

    Raises:
      ValueError: a record is too long or unusable. Of a large source `check_data` has read only some.
    """
    return self._collected(lambda: self.collect(state, draw, step), step)

  def finished(self, collected: Collected, step: int) -> Collected:
    """All of what the step collects; messages of its verifiers are logged.

    Raises:
      ValueError: as `next_batch`, of rows that were sampled beside the updates.
    """
    collected = self._collected(collected.finished, step)
    for message in collected.messages:
      logging.warning('failed: %s', message)
    return collected

  def _collected(self, collect: Callable[[], Collected], step: int) -> Collected:
    try:
      return collect()
    except (batching.TooLong, batching.Unusable) as error:
      long = isinstance(error, batching.TooLong)
      mend = 'overlong=drop (or truncate)' if long else 'unusable=drop'
      raise ValueError(
        f'config.phases.{self.name}.source, step {step}: {error}; resume with --on_mismatch=continue '
        f'and --config.phases.{self.name}.collect.{mend}'
      ) from error

  def update_all(
    self, state: TrainState, batch: Batch, step: int, further: Mapping[str, Batch] = {}
  ) -> tuple[TrainState, list[dict[str, Any]]]:
    """One update on each minibatch of a collected batch: (new state, metrics of each update).

    Networks make theirs before those of the policy, on the states that they have scored. Anchors that
    learn make theirs after those of the policy, and then come the further updates of the policy that are
    due. The metrics of all of these, which begin with the name and a slash, are in every report.

    Args:
      further: batches of further updates, by name.
    """
    phase, others = self.phase, {}

    # Networks, on the states that they have scored.
    for name, update in self.networks.items():
      sizes = dict(epochs=1, parts=phase.networks[name].minibatches, other=f'network {name}')
      state, others[name] = self._updates(update, state, batch.replace(layout=PLAIN), step, **sizes)

    # The policy.
    sizes = dict(epochs=phase.epochs, parts=phase.minibatches)
    state, reports = self._updates(self.update, state, batch, step, **sizes)

    # Anchors that learn, and then the policy again, on other batches.
    for name, update in self.learn.items():
      sizes = dict(epochs=1, parts=phase.learned[name].minibatches, other=f'anchor {name}')
      state, others[name] = self._updates(update, state, batch, step, **sizes)
    for name, rows in further.items():
      sizes = dict(epochs=1, parts=phase.further[name].minibatches, other=name, together=1)
      state, others[name] = self._updates(self.more[name], state, rows, step, **sizes)

    found = {f'{name}/{k}': x for name, own in others.items() for k, x in averages(own).items()}
    return state, [report | found for report in reports]

  def _updates(
    self,
    update: Callable,
    state: TrainState,
    batch: Batch,
    step: int,
    *,
    epochs: int,
    parts: int,
    other: str = '',
    together: int = 0,
  ) -> tuple[TrainState, list[dict[str, Any]]]:
    """An update on each minibatch: of the policy, or of an anchor, a network or a further one, `other`.

    Args:
      together: rows that no cut separates; 0 is those of a prompt.
    """
    phase, mesh = self.phase, self.experiment.mesh
    together = together or phase.rows_per_prompt
    cuts = minibatches(
      batch,
      epochs=epochs,
      parts=parts,
      rows_per_prompt=together,
      seed=(self.seed, step),
    )
    reports = []
    for minibatch in cuts:
      minibatch = pack(
        minibatch,
        parts=phase.micro_batches,
        rows_per_prompt=together,
        data_parallel_size=sharding.data_parallel_size(mesh),
      )
      state, report = update(state, sharding.place_batch(mesh, minibatch))
      report = sharding.to_host(report)
      if minibatch.layout.pack:
        report['rows_forwarded'] = forwarded_fraction(minibatch, phase.micro_batches)
      who = f'{self.name}, {other}' if other else self.name
      stop_if_broken(report, self.experiment.max_skipped, who, step)
      reports.append(report)
    return state, reports

  def speed(self, collected: Collected, updating: float, seconds: float) -> dict[str, float]:
    """Seconds and operations of the updates, memory, and how much of the devices a step uses.

    Args:
      updating: seconds of the updates.
      seconds: of the whole step.
    """
    model, phase = self.experiment.model.config, self.phase
    logits = 'values_after' not in phase.objective.requires  # a reward model has none
    flops = speed.update_flops(model, collected.batch, phase.layout, logits=logits)
    if 'teacher_logits' in phase.objective.requires:
      teacher = phase.frozen.get('teacher', self.experiment.model)
      there = dict(layers=teacher.hidden is not None)
      flops += speed.forward_flops(teacher.config, collected.batch, phase.layout, **there)
    meter = speed.Meter()
    meter.add('update', phase.epochs * flops + self.other_flops(collected))
    found = {'seconds/update': updating, **meter.take()}
    used = {k: v for k, v in collected.metrics.items() if k.startswith(('seconds/', 'flops/'))}
    peak = speed.peak_flops()
    return found | speed.peak_memory() | speed.utilization(used | found, seconds, peak)

  def other_flops(self, collected: Collected) -> float:
    """Operations of the updates of networks and of anchors, and of further ones of the policy.

    Each reads its batch once. A network learns on states that are computed for it; its own products are
    not counted, since they are few beside those of the model.
    """
    phase, policy = self.phase, self.experiment.policy
    model, total = self.experiment.model.config, 0.0
    for one in phase.network_learners(policy).values():
      total += speed.forward_flops(one.policy.config, collected.batch, logits=False)
    for one in phase.learned.values():
      logits = 'values_after' not in one.objective.requires
      total += speed.update_flops(model, collected.batch, phase.layout, logits=logits)
    for name, rows in collected.further.items():
      logits = 'values_after' not in phase.further[name].objective.requires
      total += speed.update_flops(model, rows, rows.layout, logits=logits)
    return total

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """Held-out metrics if they are due after `step` batches, else {}; shows some samples."""
    held_out = self.phase.held_out and self.due(self.phase.held_out_every, step)
    rows = self.measure_rows(state) if held_out else {}
    if not self.due(self.experiment.evaluation.every, step):
      return rows
    found, samples = self.measure(state.params)
    for name in self.experiment.evaluation.anchors:
      if name in state.anchors:
        anchor = parameter_sets(state, self.phase.frozen)[name]
        again, _ = self.measure(anchor)
        found |= {k.replace('evaluation/', f'evaluation_{name}/'): v for k, v in again.items()}
    if self.logs.writer:
      title = f'{self.name}, step {step}: held out'
      metrics.show_samples(title, samples[: self.experiment.show_samples])
    if self.logs.store:
      self.logs.store.write_samples(self.name, int(state.step), samples)
    return found | rows

  def improved(self, state: TrainState, row: dict[str, float]) -> bool:
    """Whether the metrics of a step have the best `keep_best` of the last phase so far.

    Raises:
      ValueError: there is no metric of this name.
    """
    name, experiment, progress = self.experiment.keep_best, self.experiment, self.logs.progress
    if not name or self.name != experiment.order[-1]:
      return False
    if name not in row:
      if not progress.measured and self.has_all_metrics(int(state.phase_step), row):
        raise ValueError(f'config.keep_best: unknown {name!r}{suggest(name, row)}')
      return False
    # A row before the first step holds evaluations alone.
    if 'loss' not in row:
      return False
    return progress.improved(row[name], int(state.step))

  def note_plateau(self, row: dict[str, float]) -> None:
    """Notes the metric of a step by which the phase may see that it is on a plateau.

    Raises:
      ValueError: there is no metric of this name.
    """
    phase, name = self.phase, self.phase.plateau_metric
    if not phase.plateau:
      return
    if name not in row:
      raise ValueError(
        f'config.phases.{self.name}.plateau_metric: unknown {name!r}{suggest(name, row)}'
      )
    self.logs.progress.note(self.name, row[name], 2 * phase.plateau)

  def has_all_metrics(self, step: int, row: dict[str, float]) -> bool:
    """Whether the row after `step` batches has metrics of all kinds that `keep_best` may be of."""
    if not self.experiment.keep_best.startswith('evaluation'):
      return 'loss' in row
    every = [self.experiment.evaluation.every]
    if self.phase.held_out:
      every.append(self.phase.held_out_every)
    return all(self.due(n, step) for n in every if n)

  def write(self, state: TrainState, values: dict[str, float]) -> None:
    """Appends a row to the run's metrics."""
    if self.logs.writer:
      self.logs.writer.write(int(state.step), self.name, values)

  def keep_rows(self, state: TrainState, collected: Collected, step: int) -> None:
    """Stores some rows of the collected batch if they are due after `step` batches."""
    kept = self.experiment.rollouts
    if self.logs.store and (step == 1 or self.due(kept.every, step)):
      group = max(self.phase.rows_per_prompt, self.phase.collect.rows_per_prompt)
      self.logs.store.write_rows(
        self.name,
        int(state.step),
        collected.batch,
        -(-kept.rows // group) * group,
        tokenizer=self.experiment.tokenizer,
        number=step - 1,
        terms=collected.terms,
        episodes=collected.episodes,
      )

  def show(self, collected: Collected, step: int) -> None:
    """Prints some samples of the collected batch if they are due after `step` batches."""
    if self.logs.writer and collected.samples and self.due(self.experiment.samples_every, step):
      title = f'{self.name}, step {step}'
      metrics.show_samples(title, collected.samples[: self.experiment.show_samples])


def start_phase(experiment: Experiment, state: TrainState, logs: Logs) -> PhaseRun:
  """The phase that the state is in; compiles nothing yet."""
  name = experiment.order[int(state.phase)]
  phase = experiment.phases[name]
  made = context(experiment, phase, int(state.phase))
  measured = experiment.evaluation.in_phase(name)
  jitted = lambda learners: {name: jit_learner(one, state) for name, one in learners.items()}
  return PhaseRun(
    experiment=experiment,
    name=name,
    phase=phase,
    seed=made.seed,
    collect=phase.collect.make(made),
    update=jit_update(experiment, phase, state),
    learn=jitted(phase.anchor_learners(experiment.policy)),
    networks=jitted(phase.network_learners(experiment.policy)),
    more=jitted(phase.further_learners(experiment.policy)),
    measure=evaluate.make_evaluator(dataclasses.replace(experiment, evaluation=measured))
    if measured.every
    else None,
    measure_rows=evaluate.make_row_evaluator(phase, made),
    observe=jit(phase.curriculum.update, small=True),
    categories=phase.curriculum.names(phase.source),
    recall=responses.make_recall(made, phase.collect.temperature)
    if 'drift' in phase.curriculum.reads
    else None,
    logs=logs,
  )


def run_phase(
  experiment: Experiment, state: TrainState, keep: Callable[[TrainState], None], logs: Logs
) -> TrainState:
  """Trains from the state until its phase has made all steps; a step collects and uses one batch.

  Args:
    keep: is called with the state where a checkpoint is due.
  """
  run, progress = start_phase(experiment, state, logs), logs.progress
  first, last = int(state.phase_step), run.phase.steps
  bar = tqdm(total=last, initial=first, desc=run.name, disable=logs.writer is None, mininterval=1.0)
  silent = 0  # consecutive batches without a gradient

  run.prepare(state)
  for step in range(first, last):
    if ends_early(experiment, run.name, progress):
      break
    barriers.together(f'beginning of a step of {run.name}', detail=f'step {step}')
    logs.profiler.begin(step)
    started = time.perf_counter()

    # Draw records, and collect a batch from them.
    draw = run.draw(state)
    collected = run.next_batch(state, draw, step)

    # Update on each minibatch, then count the batch as used.
    updating = time.perf_counter()
    state, reports = run.update_all(state, collected.batch, step, collected.further)
    updated = time.perf_counter()
    collected = run.finished(collected, step)
    state = run.advance(state, collected, draw)

    # Evaluate and report. The time of a step is without its evaluation.
    logs.profiler.end(step)
    now = time.perf_counter()
    row = summary(reports, collected, now - started) | draw.report() | run.curriculum(state)
    row |= run.speed(collected, updated - updating, now - started)
    progress.tokens += int(np.sum(collected.batch.segment_ids > 0))
    row['tokens_seen'] = progress.tokens
    silent = silent + 1 if row['silent'] else 0
    warn_if_silent(row, silent, experiment.max_silent, run.name, step)
    found = run.evaluate(state, step + 1)
    bar.update()
    bar.set_postfix_str(postfix(row))
    if found or run.due(experiment.log_every, step + 1):
      run.write(state, row | found)
    run.show(collected, step + 1)
    run.keep_rows(state, collected, step + 1)

    # Save where it is due, and before the machine is taken away.
    stop = preemption.asked()
    better = run.improved(state, row | found)
    run.note_plateau(row)
    ended = ends_early(experiment, run.name, progress)
    if stop or better or ended or run.due(experiment.checkpoint_every, step + 1):
      keep(state)
    if stop:
      bar.close()
      logging.warning('asked to stop: %s has saved its step %d', run.name, step + 1)
      raise SystemExit(preemption.CODE)
    if ended and logs.writer:
      bar.write(f'{run.name} stops early: {ended}')
  bar.close()
  return state


def ends_early(experiment: Experiment, name: str, progress: Progress) -> str:
  """Why a phase makes no further step, or ''."""
  phase = experiment.phases[name]
  if progress.on_plateau(name, phase.plateau):
    return (
      f'{phase.plateau_metric} is on a plateau: its mean over the last {phase.plateau} batches is no '
      'larger than over as many before'
    )
  return ran_out_of_patience(experiment, progress)


def ran_out_of_patience(experiment: Experiment, progress: Progress) -> str:
  """Why the run stops early, or ''."""
  if not 0 < experiment.patience <= progress.waited:
    return ''
  best = 'was never a number' if progress.best is None else f'was best, {progress.best:.4g}'
  where = '' if progress.best is None else f', after {progress.best_step} updates'
  return f'{progress.metric} {best}{where}, and {progress.waited} measurements were no better'


class Drawer:
  """Draws the records of a step, those that the curriculum of the phase proposes.

  `cursor` is the number of records that the phase has drawn, also of those dropped. Whether records that
  are too long or unusable are dropped here or refused later depends on `overlong` and `unusable` of the
  phase's collector. What is drawn depends only on the cursor and the state of the curriculum, so a
  resumed run draws the same.
  """

  def __init__(
    self,
    phase: Phase,
    seed: int,
    cursor: int,
    tokenizer: Tokenizer | None = None,
    curriculum_state: Any = (),
  ):
    self.phase, self.seed, self.cursor, self.tokenizer = phase, seed, cursor, tokenizer
    self.curriculum_state = curriculum_state
    self.taken = []  # rows drawn so far
    self.fates = collections.Counter()  # of the records drawn so far, see `batching.fate`

  def __call__(self, count: int) -> list[dict]:
    if not batching.drops(self.phase.collect):
      return self._next(count)
    records, dropped = [], 0
    while len(records) < count:
      found = self._next(count - len(records))
      for record, fate in zip(found, self._fates(found), strict=True):
        self.fates[fate] += 1
        kept = fate in ('kept', 'cut')
        dropped = 0 if kept else dropped + 1
        if kept:
          records.append(record)
      # Any two epochs hold every record; a curriculum may have drawn some of them again and again.
      if dropped >= 2 * len(self.phase.source):
        raise ValueError(
          f'the last {dropped} records that were drawn are too long or unusable, and dropped; the '
          f'source has {len(self.phase.source)}'
        )
    return records

  def report(self) -> dict[str, float]:
    """How many records were dropped or cut, if the phase does so."""
    if not batching.drops(self.phase.collect):
      return {}
    dropped = self.fates['dropped'] + self.fates['unusable']
    return {'records/dropped': float(dropped), 'records/cut': float(self.fates['cut'])}

  def _fates(self, records: Sequence[dict]) -> Iterable[str]:
    """What becomes of each record; a process lays out its share of them, and is told of the others."""
    fate = lambda i: batching.fate(self.phase.collect, records[i], self.tokenizer)
    own = exchanges.share(len(records))
    return itertools.chain(*exchanges.every(lambda: [*map(fate, own)], 'records that fit'))

  def _next(self, count: int) -> list[dict]:
    source = self.phase.source
    request = curricula.Request(
      count=count,
      size=len(source),
      cursor=self.cursor,
      seed=self.seed,
      shuffle=self.phase.shuffle,
      taken=tuple(self.taken),
      samples_per_prompt=getattr(self.phase.collect, 'samples_per_prompt', 1),
      records=source,
    )
    rows = np.ravel(self.phase.curriculum.propose(self.curriculum_state, request)).tolist()
    known = all(isinstance(row, int) and 0 <= row < len(source) for row in rows)
    if len(rows) != count or not known:
      raise ValueError(
        f'the curriculum proposed {len(rows)} rows, beginning with {rows[:4]}; a step asks for '
        f'{count} row numbers from 0 to {len(source) - 1}'
      )
    self.cursor += count
    self.taken += rows
    return [{**source[row], 'id': row} for row in rows]


def jit_update(experiment: Experiment, phase: Phase, state: TrainState) -> 'Update':
  """`Learner.update` of the phase, compiled, see `jit_learner`."""
  return jit_learner(phase.learner(experiment.policy), state)


@dataclasses.dataclass(frozen=True)
class Update:
  """A compiled update: (state, batch) -> (state, metrics)."""

  program: Program

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    after, report = self.program(state.replace(responses=()), batch)
    return after.replace(responses=state.responses), report

  def ahead(self, state: TrainState, phase: Phase, mesh: jax.sharding.Mesh) -> None:
    """Asks for compilation in the background, for minibatches of the phase, see `Program.ahead`."""
    state = state.replace(responses=())
    self.program.ahead(lambda: (state, empty_minibatch(phase, mesh)))


def jit_learner(learner: Learner | AnchorLearner | NetworkLearner, state: TrainState) -> Update:
  """`update` of the policy, of an anchor or of a network, compiled.

  It donates the state that it is given, and shards the new state in the same way. What is on the host
  alone (`TrainState.responses`) is not part of the program.
  """
  shardings = jax.tree.map(lambda x: x.sharding, state.replace(responses=()))
  return Update(Program(jit(learner.update, donate_argnums=0, out_shardings=(shardings, None))))


def empty_minibatch(phase: Phase, mesh: jax.sharding.Mesh) -> Batch:
  """A minibatch of a phase without packing, with zeros in all of its arrays, on the devices."""
  shapes = tracing.batch_shapes(phase, phase.collect.rows // phase.minibatches)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  return sharding.place_batch(mesh, zeros.replace(layout=phase.layout))


def advance(
  mesh: jax.sharding.Mesh,
  state: TrainState,
  collected: Collected,
  cursor: int,
  curriculum_state: Any = None,
) -> TrainState:
  """The state after a collected batch was used: it is counted, and its new states are taken over.

  Args:
    cursor: number of records that the phase has drawn with those of the batch.
    curriculum_state: the next one; None: as before.
  """
  moved = dict(
    phase_step=np.asarray(int(state.phase_step) + 1, np.int32),
    cursor=np.asarray(cursor, np.int32),
    collect_state=collected.collect_state,
    credit_state=collected.credit_state,
  )
  if curriculum_state is not None:
    moved['curriculum_state'] = curriculum_state
  return state.replace(**sharding.replicate(mesh, moved))


def forwarded_fraction(minibatch: Batch, micro_batches: int) -> float:
  """Rows that the model forwards, as a fraction of the rows of a minibatch; 1 where none are packed."""
  rows = len(minibatch.tokens)
  return (minibatch.layout.rows * micro_batches or rows) / rows


def stop_if_broken(report: dict[str, Any], limit: int, phase: str, step: int) -> None:
  """Warns if the update was skipped.

  Args:
    phase: its name, followed by that of the anchor or network if the update is one of these.

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


def averages(reports: list[dict]) -> dict[str, float]:
  """Means over updates (of `LARGEST` the maxima); `skipped` is the number of updates that were skipped.

  An update in which a metric counted nothing (`learner.EMPTY`), such as the accuracy of pairs that are
  all ties, is left out of its mean; a metric that counted nothing in any update is left out.
  """
  join = lambda name: np.max if name in LARGEST else np.mean
  names = [name for name in reports[0] if not name.startswith(EMPTY)]
  counted = {k: [r[k] for r in reports if not r.get(f'{EMPTY}{k}')] for k in names}
  found = {k: float(join(k)(values)) for k, values in counted.items() if values}
  return found | {'skipped': float(sum(r['skipped'] > 0 for r in reports))}


def summary(reports: list[dict], collected: Collected, seconds: float) -> dict[str, float]:
  """The metrics of one step.

  These are those of its updates (see `averages`), the metrics of the collected batch, and the speed in
  tokens of the mask per second.
  """
  average = averages(reports)
  tokens = float(np.sum(collected.batch.mask))
  silent = float(average['grad_norm'] == 0)
  return (
    average
    | collected.metrics
    | {'silent': silent, 'seconds': seconds, 'tokens_per_second': tokens / seconds}
  )


# A run stops after this number of consecutive batches without a gradient if every verifier fails, or the
# environment in every row.
MAX_FAILED = 10


def warn_if_silent(row: dict[str, float], silent: int, limit: int, phase: str, step: int) -> None:
  """Says why batches teach nothing, after 5, 10, 20, ... consecutive ones.

  Raises:
    RuntimeError: `limit` (0: no limit) consecutive batches had no gradient; or `MAX_FAILED` had none,
      and in the last of them every verifier failed, or the environment in every row.
  """
  limits = {'config.max_silent': limit}
  failed = {
    'verifier_errors': 'every verifier failed',
    'environment_errors': 'the environment failed in every row',
  }
  failures = [why for name, why in failed.items() if row.get(name, 0)]
  if failures and not np.isfinite(row.get('reward', 0)):
    why = failures[0]
    limits['phases.MAX_FAILED'] = MAX_FAILED
  elif row.get('reward/same_in_group') == 1:
    why = 'the rewards of each group are all equal'
  else:
    why = 'no token in the loss has a gradient'
  text = f'{phase}, step {step}: {silent} batches in a row taught nothing: {why}'
  for name, most in limits.items():
    if 0 < most <= silent:
      raise RuntimeError(f'{text}; stopped after {most} of them ({name})')
  if silent in {5 * 2**n for n in range(20)}:
    logging.warning('%s', text)


LARGEST = ('sampler_max_gap',)  # metrics whose maximum over the updates of a step is reported

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
