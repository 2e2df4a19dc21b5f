"""Runs an experiment: source, sample, score, credit, update, log, checkpoint.

    python -m polgrad.train --config=experiments/quickstart.py --workdir=runs/quickstart

Start it again with the same workdir and it goes on where the last whole checkpoint was made, bit
for bit. Every process of a pod runs this same command."""

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
from polgrad.build import Experiment, Phase, build
from polgrad.collect import Collected, Context, minibatches
from polgrad.compiling import jit
from polgrad.data import stream
from polgrad.learner import make_update
from polgrad.models.policy import Policy, learned
from polgrad.packing import pack
from polgrad.types import Params, TrainState


def main(argv: list[str]) -> None:
  cli.start(argv)
  run(cli.CONFIG.value, cli.WORKDIR.value, cli.checkpoint_folder())


def run(config: ml_collections.ConfigDict, workdir: str, folder: str = '') -> TrainState:
  """Trains to the end, from the last checkpoint if there is one.

  Args:
    workdir: a local folder for metrics, samples and the report.
    folder: where checkpoints go; all processes must reach it. Default: `workdir`/checkpoints.
  """
  experiment = build(config)
  os.makedirs(workdir, exist_ok=True)
  chief = jax.process_index() == 0
  if chief:
    with open(os.path.join(workdir, 'config.json'), 'w') as f:
      json.dump(json.loads(config.to_json_best_effort()), f, indent=2)
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
    checkpoints.close()  # lets a save that is under way come to its end
  if chief:
    writer.close()
    print(f'metrics, checkpoints and curves are in {workdir}; see {metrics.report(workdir)}')
  return state


def open_writer(experiment: Experiment, state: TrainState, workdir: str) -> metrics.Writer:
  """Metrics of the run so far, up to this state."""
  begun = int(state.phase) + (int(state.phase_step) > 0)
  return metrics.Writer(
    workdir,
    step=int(state.step),
    past=experiment.order[:begun],
    tensorboard=experiment.tensorboard,
  )


def resume(experiment: Experiment, checkpoints: Any) -> TrainState:
  """The state of the last whole checkpoint, or a new one."""
  state = begin(experiment, 0, None)
  step = checkpoints.latest_step()
  if step is None:
    return state
  meta = checkpoint.read_meta(checkpoints, step)
  if tuple(meta['order']) != experiment.order:
    raise ValueError(f'the checkpoint ran phases {meta["order"]}, not {experiment.order}')
  if meta['phase']:
    state = begin(experiment, meta['phase'], state)
  print(f'going on from checkpoint {step}, in phase {experiment.order[meta["phase"]]}')
  restore = functools.partial(checkpoint.restore, checkpoints, step)
  rest = restore('rest', state.replace(params=None))
  return rest.replace(params=restore('params', state.params))


def begin(experiment: Experiment, index: int, before: TrainState | None) -> TrainState:
  """The state at the start of a phase: new optimizer, anchors copied from the policy."""
  phase = experiment.phases[experiment.order[index]]
  mesh = experiment.mesh
  fresh = functools.partial(init_params, experiment.policy, mesh, experiment.seed)
  params = fresh() if before is None else before.params
  moving = learned(experiment.policy, params)
  anchors = {
    name: init_params(phase.frozen[name], mesh, experiment.seed)
    if name in phase.frozen
    else jax.tree.map(jnp.copy, moving)
    for name in phase.anchors
  }
  if phase.restart and before is not None:
    params = fresh()
    moving = learned(experiment.policy, params)
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
    opt_state=init_opt_state(phase.optimizer, mesh, moving),
    anchors=anchors,
    **small,
  )


def init_params(policy: Policy, mesh: jax.sharding.Mesh, seed: int) -> Params:
  """Parameters where the mesh wants them, from the seed or from the policy's files."""
  shapes = policy.shapes()
  shardings = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
  return policy.init(jax.random.key(seed), shardings)


def init_opt_state(
  optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, params: Params
) -> Any:
  """Optimizer state, where `opt_shardings` says."""
  return jit(optimizer.init, out_shardings=opt_shardings(optimizer, mesh, params))(params)


def opt_shardings(
  optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, params: Params
) -> Any:
  """What an optimizer keeps for a parameter lies where the parameter lies; params or their shapes."""
  keys = lambda path: tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
  places = {keys(path): p for path, p in jax.tree_util.tree_leaves_with_path(params)}
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def place(path, x):
    names = keys(path)  # ends with the keys of the parameter, if it is of one
    owners = [places[names[i:]] for i in range(len(names)) if names[i:] in places]
    return owners[0].sharding if owners and owners[0].shape == x.shape else whole

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def run_phase(
  experiment: Experiment, state: TrainState, checkpoints: Any, writer: metrics.Writer | None
) -> TrainState:
  """Collect, update, report, until the phase has made its steps."""
  name = experiment.order[int(state.phase)]
  phase = experiment.phases[name]
  used = context(experiment, phase, int(state.phase))
  collect = phase.collect.make(used)
  update = jit_update(experiment, phase, state)
  arrange = functools.partial(
    pack,
    parts=phase.micro_batches,
    rows_per_prompt=phase.rows_per_prompt,
    data_parallel_size=sharding.data_parallel_size(experiment.mesh),
  )
  plan = experiment.evaluation
  measure = evaluate.make_evaluator(experiment) if plan.every else None
  every = lambda n, step: n > 0 and (step % n == 0 or step == phase.steps)

  def evaluated(step: int) -> dict[str, float]:
    if not (every(plan.every, step) or (plan.every and step == 0)):
      return {}
    found, samples = measure(state.params)
    if writer:
      metrics.show_samples(f'{name}, step {step}: held out', samples[: experiment.show_samples])
    return found

  first = int(state.phase_step)
  bar = tqdm(total=phase.steps, initial=first, desc=name, disable=writer is None, mininterval=1.0)
  if first == 0 and (found := evaluated(0)) and writer:
    writer.write(int(state.step), name, found)
  for step in range(first, phase.steps):
    started = time.perf_counter()
    draw = Drawer(phase, used.seed, int(state.cursor))
    collected = collect(state, draw, step)
    for message in collected.messages:
      logging.warning('verifier: %s', message)
    cuts = minibatches(
      collected.batch,
      epochs=phase.epochs,
      parts=phase.minibatches,
      rows_per_prompt=phase.rows_per_prompt,
      seed=(used.seed, step),
    )
    reports = []
    for cut in cuts:
      cut = arrange(cut)
      state, report = update(state, sharding.place_batch(experiment.mesh, cut))
      reports.append(sharding.to_host(report))
      if cut.layout.pack:
        packed = cut.layout.rows * phase.micro_batches
        reports[-1]['rows_forwarded'] = (packed or len(cut.tokens)) / len(cut.tokens)
      stop_if_broken(reports[-1], experiment.max_skipped, name, step)
    state = advance(experiment.mesh, state, collected, draw.cursor)
    row = summary(reports, collected, time.perf_counter() - started)
    found = evaluated(step + 1)
    bar.update()
    bar.set_postfix_str(postfix(row))
    if writer and (found or every(experiment.log_every, step + 1)):
      writer.write(int(state.step), name, row | found)
    if writer and collected.samples and every(experiment.samples_every, step + 1):
      metrics.show_samples(f'{name}, step {step + 1}', collected.samples[: experiment.show_samples])
    if every(experiment.checkpoint_every, step + 1):
      save(experiment, checkpoints, state)
  bar.close()
  return state


class Drawer:
  """Draws the next records of a phase's stream and keeps count."""

  def __init__(self, phase: Phase, seed: int, cursor: int):
    self.phase, self.seed, self.cursor = phase, seed, cursor

  def __call__(self, count: int) -> list[dict]:
    at, self.cursor = self.cursor, self.cursor + count
    return stream.records(
      self.phase.source, seed=self.seed, cursor=at, count=count, shuffle=self.phase.shuffle
    )


def context(experiment: Experiment, phase: Phase, index: int) -> Context:
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
  """The compiled update; it gives its state back where it found it."""
  update = make_update(
    experiment.policy,
    phase.objective,
    phase.optimizer,
    temperature=phase.collect.temperature,
    micro_batches=phase.micro_batches,
    anchors=phase.anchors,
    frozen=phase.frozen,
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jit(update, donate_argnums=0, out_shardings=(shardings, None))


def advance(
  mesh: jax.sharding.Mesh, state: TrainState, collected: Collected, cursor: int
) -> TrainState:
  """Counts one more collected batch."""
  moved = dict(
    phase_step=np.asarray(int(state.phase_step) + 1, np.int32),
    cursor=np.asarray(cursor, np.int32),
    collect_state=collected.collect_state,
    credit_state=collected.credit_state,
  )
  return state.replace(**sharding.replicate(mesh, moved))


def stop_if_broken(report: dict[str, Any], limit: int, phase: str, step: int) -> None:
  """A skipped update is reported; `limit` of them in a row end the run."""
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
  """One row of metrics: updates averaged, data as collected, and speed."""
  average = {k: float(np.mean([r[k] for r in reports])) for k in reports[0]}
  average['skipped'] = float(sum(r['skipped'] > 0 for r in reports))
  tokens = float(np.sum(collected.batch.mask))
  return average | collected.metrics | {'seconds': seconds, 'tokens_per_second': tokens / seconds}


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
  meta = {'order': list(experiment.order), 'phase': int(state.phase)}
  trees = {'params': state.params, 'rest': state.replace(params=None)}
  checkpoint.save(checkpoints, int(state.step), trees, meta)


if __name__ == '__main__':
  app.run(main)
