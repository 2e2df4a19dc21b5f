"""What a model does on held-out data: accuracy on problems (greedy, pass@k, maj@k), losses on records.

    python -m polgrad.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart

Without --workdir (and --checkpoints) it measures the model as it was before training: that of the
files which the configuration names, or one with random parameters.

Where the last phase learns from given completions, its loss and metrics on the held-out ones are
printed too: of preferences and reward models the accuracy, of demonstrations the loss.

A completion whose verifier failed is neither right nor wrong. All rates leave it out, and the metric
`evaluation/verifier_errors` counts it.
"""

import collections
import functools
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from polgrad import checkpoint, cli, exchanges, metrics, sharding
from polgrad.build import TABLE, Evaluation, Experiment, Phase, build
from polgrad.collect import Context, Given, also_read, completions, make_draws, question
from polgrad.collect.base import laid_out, make_annotator
from polgrad.collect.drawn import earned, transcript
from polgrad.compiling import jit
from polgrad.data import batching, sources
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments.episodes import Episode
from polgrad.models.policy import Policy, learned, overlay
from polgrad.packing import pack
from polgrad.reductions import merged
from polgrad.sampling import behavior_policies
from polgrad.types import Batch, Params, TrainState

MOST_KINDS = 10  # more kinds of held-out records than these are not told apart
EVALUATION_STEP = 2**31 - 1  # seeds the sampling noise, with a step that no training step has
Samples = list[tuple[str, str, float]]  # (prompt, completion, reward)


def mark(scores: np.ndarray, threshold: float) -> np.ndarray:
  """1 where score >= threshold (solved), 0 where not, NaN where the verifier failed; any shape."""
  return np.where(np.isnan(scores), np.nan, scores >= threshold)


def pass_at_k(marks: np.ndarray, k: int) -> float:
  """Probability that at least one of k samples is right, an unbiased estimate (arXiv:2107.03374).

      mean over problems of 1 - C(n - c, k) / C(n, k)

  n is the number of a problem's verified samples, and c the number of right ones among them. A problem
  with fewer than k verified samples is left out; without any problem the mean is NaN.

  Args:
    marks: f[N, samples], see `mark`.
    k: 1 to samples.

  Raises:
    ValueError: k is out of range.
  """
  if not 1 <= k <= marks.shape[1]:
    raise ValueError(f'pass@{k} needs k between 1 and the {marks.shape[1]} samples')
  estimates = []
  for row in marks:
    n, c = int(np.isfinite(row).sum()), int(np.nansum(row))
    if n >= k:
      estimates.append((math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k))
  return mean(estimates)


def majority_at_k(answers: Sequence[Sequence[str]], marks: np.ndarray) -> float:
  """Fraction of problems whose most frequent answer is right.

  Of equally frequent answers the earliest is taken. An answer is right if the first sample that gave
  it is. Samples whose verifier failed have no vote; a problem without votes is left out, and without
  any problem the result is NaN.

  Args:
    answers: [N][k] texts, equal where the answers are equal.
    marks: f[N, k], see `mark`.
  """
  right = []
  for row, verdicts in zip(answers, marks):
    votes = [(text, v) for text, v in zip(row, verdicts) if not np.isnan(v)]
    if votes:
      [(winner, _)] = collections.Counter(text for text, _ in votes).most_common(1)
      right.append(next(v for text, v in votes if text == winner))
  return mean(right)


def mean(values: Sequence[float] | np.ndarray) -> float:
  """The mean, and NaN without a warning if there are no values."""
  return float(np.mean(values)) if len(values) else math.nan


class Attempts(NamedTuple):
  """Completions of the N held-out problems with their scores."""

  records: list[dict]  # the problems, [N]
  texts: list[list[str]]  # completions, [N][samples]
  scores: np.ndarray  # rewards f[N, samples], NaN where the verifier or the environment failed
  episodes: list[Episode]  # [N * samples]; [] without an environment

  @property
  def failed(self) -> int:
    """Episodes that the environment did not answer to their end."""
    return sum(not episode.valid for episode in self.episodes)


def make_evaluator(experiment: Experiment) -> Callable[[Params], tuple[dict, Samples]]:
  """Makes `evaluate(params) -> (metrics, greedy samples)` for the experiment's `evaluation`."""
  plan = experiment.evaluation
  greedy = sampler(experiment, 1, behavior_policies.greedy)
  several = sampler(experiment, plan.samples, behavior_policies.current) if plan.samples else None

  def evaluate(params: Params) -> tuple[dict[str, float], Samples]:
    # One greedy completion of each problem.
    one = attempt(experiment, greedy, params, 1)
    errors = np.isnan(one.scores).sum() - one.failed
    found = {
      'evaluation/greedy': pass_at_k(mark(one.scores, plan.threshold), 1),
      'evaluation/reward': mean(one.scores[~np.isnan(one.scores)]),
    }

    # Several samples of each problem, for pass@k and maj@k.
    if several:
      many = attempt(experiment, several, params, plan.samples)
      errors += np.isnan(many.scores).sum() - many.failed
      marks = mark(many.scores, plan.threshold)
      for k in sorted({1, plan.samples}):
        found[f'evaluation/pass@{k}'] = pass_at_k(marks, k)
      answers = [[sources.last_match(text, plan.answer) for text in row] for row in many.texts]
      found[f'evaluation/maj@{plan.samples}'] = majority_at_k(answers, marks)

    found['evaluation/verifier_errors'] = float(errors)
    if plan.overlong != 'error':
      counts = collections.Counter(fate for _, fate in problems(experiment))
      found |= {f'evaluation/{fate}': float(counts[fate]) for fate in ('dropped', 'cut')}
    if one.episodes:
      found['evaluation/turns'] = mean([len(e.turns) for e in one.episodes])
      found['evaluation/environment_errors'] = float(one.failed)
    said = [transcript(e) for e in one.episodes] or [text for [text] in one.texts]
    rows = zip(one.records, said, one.scores)
    return found, [(question(r), text, float(score[0])) for r, text, score in rows]

  return evaluate


def attempt(
  experiment: Experiment,
  sample: Callable,
  params: Params,
  samples: int,
  look: Callable[[Batch, int, Mapping], None] = lambda rollout, rows, others: None,
) -> Attempts:
  """Completes and scores the first `problems` rows of the evaluation's source that are not dropped.

  Args:
    sample: of `sampler`, which makes `samples` completions of each prompt.
    look: called with each rollout (NumPy), the number of its rows that count, and functions that make
      further lists about these rows, see `collect.also_read`.
  """
  plan = experiment.evaluation
  tokenizer = plan.own(experiment.tokenizer)
  kept = [record for record, fate in problems(experiment) if fate != 'dropped']
  lay = functools.partial(plan.lay_out, tokenizer=tokenizer, cut=plan.overlong == 'truncate')
  records, texts, scores, episodes = [], [], [], []
  # Verifiers start while the first batch is decoded, which may have to compile.
  plan.score.begin(len(exchanges.strided(range(min(len(kept), plan.batch) * samples))))
  for start in range(0, len(kept), plan.batch):
    piece = kept[start : start + plan.batch]

    # The last batch is filled up with copies of its last problem, so that one shape compiles.
    padded = piece + [piece[-1]] * (plan.batch - len(piece))
    prompts = laid_out(lay, padded)
    drawn = sample(
      {'policy': params},
      prompts,
      padded,
      prompts.ids,
      seed=experiment.seed,
      step=EVALUATION_STEP,
    )
    rollout = drawn.batch

    # Score the completions of the real problems; the samples of a problem are consecutive rows.
    rows = len(piece) * samples
    written = completions(rollout, padded, tokenizer, drawn.episodes)[:rows]
    lengths = [int(x) for x in rollout.mask.sum(axis=1)[:rows]]
    owners = [record for record in piece for _ in range(samples)]
    others = also_read(rollout, range(rows), plan.opened(owners), tokenizer)
    verified = verify(plan, rollout, written, owners, lengths, tokenizer)
    scores.append(verified + earned(drawn)[:rows])
    look(rollout, rows, others)
    texts += [written[i : i + samples] for i in range(0, rows, samples)]
    episodes += drawn.episodes[:rows]
    records += piece
  scores = np.concatenate(scores).reshape(-1, samples)
  return Attempts(records, texts, scores, episodes)


def verify(
  plan: Evaluation,
  rollout: Batch,
  texts: Sequence[str],
  records: Sequence[dict],
  lengths: Sequence[int],
  tokenizer: Tokenizer,
) -> np.ndarray:
  """f64[n], the rewards of verifiers of the first n rows; each process verifies some of them."""
  mine = exchanges.strided(range(len(texts)))
  given = [[x[i] for i in mine] for x in (texts, records, lengths)]
  others = also_read(rollout, mine, plan.opened(given[1]), tokenizer)
  score = lambda: plan.score(*given, others).total
  return exchanges.interleaved(exchanges.every(score, 'rewards of held-out problems'))


def problems(experiment: Experiment) -> list[tuple[dict, str]]:
  """The first `problems` rows of the evaluation's source, each 'kept', 'cut' or 'dropped'.

  Raises:
    ValueError: all are dropped.
  """
  plan = experiment.evaluation
  found = []
  for i in range(min(plan.problems, len(plan.source))):
    record = {**plan.source[i], 'id': i}
    fate = 'kept'  # with 'error', a record that is too long is refused where it is laid out
    if plan.overlong != 'error':
      fate = batching.fate(plan, record, experiment.tokenizer)
    found.append((record, fate))
  if all(fate == 'dropped' for _, fate in found):
    raise ValueError('config.evaluation.source: each problem is too long, and dropped')
  return found


def sampler(experiment: Experiment, samples: int, behavior_policy: Callable) -> Callable:
  """The evaluation's sampler, with `samples` completions of each prompt."""
  plan = experiment.evaluation
  return make_draws(
    plan,
    {'policy': experiment.policy},
    tokenizer=plan.own(experiment.tokenizer),
    policy=experiment.policy,
    samples_per_prompt=samples,
    max_new_tokens=plan.max_new_tokens,
    temperature=plan.temperature,
    behavior_policy=behavior_policy,
    mesh=experiment.mesh,
  )


def init_params(policy: Policy, mesh: jax.sharding.Mesh, seed: int) -> Params:
  """Parameters, sharded over the mesh; random ones from the seed, or those of the policy's files."""
  exchanges.meet(mesh)
  shapes = policy.shapes()
  shardings = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
  return policy.init(jax.random.key(seed), shardings)


def make_row_evaluator(phase: Phase, context: Context) -> Callable[[TrainState], dict[str, float]]:
  """Makes `measure(state) -> evaluation/NAME/METRIC` on the held-out records of a phase.

  These are the loss of the phase's objective, and its metrics: of preferences the accuracy, margin and
  implicit rewards, of demonstrations the entropy. They are exact over all records, however these are
  cut into batches. If the collector knows several kinds of records, such as the pairs of several users,
  and there are at most `MOST_KINDS`, each kind is measured too, as evaluation/NAME/KIND/METRIC.
  """
  learner, collector = phase.learner(context.policy), phase.collect
  annotate = make_annotator(context, collector.temperature)
  look, devices = jit(learner.measure), sharding.data_parallel_size(context.mesh)

  def measure(state: TrainState) -> dict[str, float]:
    found = {}
    for name, source in phase.held_out.items():
      parts = {}
      for kind, records in by_kind(phase, source, context).items():
        batches = row_batches(collector, records, context)
        parts[f'{name}/{kind}'] = [of_batch(state, batch) for batch in batches]
      found |= values(f'evaluation/{name}', [part for each in parts.values() for part in each])
      if len(parts) > 1:
        for place, each in parts.items():
          found |= values(f'evaluation/{place}', each)
    return found

  def of_batch(state: TrainState, batch: Batch) -> tuple[dict, dict]:
    batch = annotate(state, batch).replace(layout=phase.layout)
    sizes = dict(parts=phase.micro_batches, rows_per_prompt=phase.rows_per_prompt)
    batch = pack(batch, **sizes, data_parallel_size=devices)
    return sharding.to_host(look(state, sharding.place_batch(context.mesh, batch)))

  def values(place: str, parts: list[tuple[dict, dict]]) -> dict[str, float]:
    terms, metrics = merged(parts)
    loss = sum(x.value() for k, x in terms.items() if k not in phase.objective.probes)
    found = {'loss': loss} | {k: x.value() for k, x in metrics.items()}
    return {f'{place}/{k}': float(v) for k, v in found.items()}

  return measure


def context(experiment: Experiment, phase: Phase, index: int) -> Context:
  """What the collector of phase number `index` reads of the run."""
  exchanges.meet(experiment.sampled_on)
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
    compare=phase.compare,
    curriculum=phase.curriculum,
    mark=phase.mark,
    sampler_mesh=None if experiment.sampled_on is experiment.mesh else experiment.sampled_on,
    networks=phase.network_learners(experiment.policy),
    source=phase.source,
    minibatches=phase.minibatches,
    elsewhere=phase.elsewhere,
    engine=experiment.engine,
  )


def row_metrics(
  experiment: Experiment, params: Params, anchors: Mapping[str, Params] = types.MappingProxyType({})
) -> dict[str, float]:
  """What `make_row_evaluator` measures for the last phase, {} if it has no held-out records.

  Args:
    params: of the policy.
    anchors: parameters of the phase's anchors by name. Those that are left out are the policy itself, or
      the frozen model of their name.
  """
  index = len(experiment.order) - 1
  phase = experiment.phases[experiment.order[index]]
  if not phase.held_out:
    return {}
  given = dict.fromkeys(phase.anchors, params) | dict(anchors)
  held = {name: learned(experiment.policy, x) for name, x in given.items()}
  for name, model in phase.frozen.items():
    held[name] = init_params(model, experiment.mesh, experiment.seed)
  zero = np.zeros((), np.int32)
  state = TrainState(
    params=params,
    anchors=held,
    opt_state=(),
    collect_state=(),
    credit_state=(),
    objective_state=phase.objective.init(),
    **dict.fromkeys(('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped'), zero),
  )
  return make_row_evaluator(phase, context(experiment, phase, index))(state)


def by_kind(phase: Phase, source: sources.Source, context: Context) -> dict[str, list[dict]]:
  """The first `held_out_records` records of a source that are not dropped, by kind, see `Given.kind`.

  If there are more than `MOST_KINDS`, all records are of the kind ''.

  Raises:
    ValueError: all records are dropped.
  """
  collector, tokenizer = phase.collect, context.tokenizer
  records = [{**source[i], 'id': i} for i in range(min(phase.held_out_records, len(source)))]
  if batching.drops(collector):
    fate = lambda one: batching.fate(collector, one, tokenizer)
    records = [record for record in records if fate(record) in ('kept', 'cut')]
  if not records:
    raise ValueError('held_out: there are no records, or each is too long or unusable, and dropped')
  found = {}
  for record in records:
    found.setdefault(collector.kind(record), []).append(record)
  return found if len(found) <= MOST_KINDS else {'': records}


def row_batches(collector: Given, records: Sequence[dict], context: Context) -> Iterator[Batch]:
  """Batches (NumPy) of these records.

  The last batch is filled up with rows without tokens in the mask, so that one shape compiles.
  """
  lay = collector.laid_by(context.tokenizer)
  for start in range(0, len(records), collector.records):
    piece = records[start : start + collector.records]
    filled = piece + [piece[-1]] * (collector.records - len(piece))
    batch = lay(filled)
    real = np.arange(collector.rows) < len(piece) * collector.rows_per_prompt
    yield batch.replace(mask=batch.mask & real[:, None])


def restore_params(
  experiment: Experiment, folder: str, step: int = -1, name: str = 'policy'
) -> Params:
  """The policy's parameters from a checkpoint of `train`.

  Args:
    folder: the folder of the run's checkpoints.
    step: number of the checkpoint; -1 is the newest, `progress.BEST` that of the best metric.
    name: 'policy', or the name of an anchor that is a copy of it, such as an average.

  Raises:
    FileNotFoundError: there is no such folder, or no complete checkpoint in it.
    ValueError: the checkpoint is of another model, or has no such anchor.
  """
  if not epath.Path(folder).is_dir():
    raise FileNotFoundError(f'{folder}: expected the checkpoints of a run')
  checkpoints = checkpoint.manager(folder)
  step = checkpoint.numbered(checkpoints, folder, step)
  policy = experiment.policy
  shapes = policy.shapes()
  shardings = sharding.param_shardings(experiment.mesh, policy.axes(shapes), shapes)
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  params = checkpoint.restore(checkpoints, step, 'params', like)
  if name == 'policy':
    return params
  # An anchor holds what updates change; the rest is that of the policy.
  found = checkpoint.restore_anchor(checkpoints, step, name, learned(policy, like))
  return overlay(params, found)


def chosen_params(experiment: Experiment) -> Params:
  """The parameters that the flags choose: of a checkpoint, or those before training.

  They are of a checkpoint if --workdir or --checkpoints is given; otherwise a line on stderr says that
  they are not.

  Raises:
    ValueError: --step or --params without a run.
    FileNotFoundError, ValueError: see `restore_params`.
  """
  if cli.WORKDIR.value or cli.CHECKPOINTS.value:
    folder, step = cli.checkpoint_folder(), cli.STEP.value
    return restore_params(experiment, folder, step, cli.PARAMS.value)
  given = [f'--{flag.name}={flag.value}' for flag in cli.chosen_of_a_run()]
  if given:
    raise ValueError(f'{" and ".join(given)}: only a run has it; name the run by --workdir')
  print('no --workdir: this is the model before training', file=sys.stderr)
  return init_params(experiment.policy, experiment.mesh, experiment.seed)


def _anchors(experiment: Experiment) -> dict[str, Params]:
  """The anchors of the last phase in the checkpoint that the flags choose; {} without one."""
  phase = experiment.phases[experiment.order[-1]]
  if not phase.held_out or not (cli.WORKDIR.value or cli.CHECKPOINTS.value):
    return {}
  names, folder = phase.anchors.keys() - phase.frozen.keys(), cli.checkpoint_folder()
  return {name: restore_params(experiment, folder, cli.STEP.value, name) for name in names}


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['config'])
  with cli.refusals():
    experiment = build(cli.config(TABLE))
    last = experiment.order[-1]
    if not experiment.evaluation.every and not experiment.phases[last].held_out:
      raise ValueError(
        'config.evaluation: the experiment has no held-out problems, and '
        f'config.phases.{last}.held_out no other records'
      )
    params = chosen_params(experiment)
  found, samples = {}, []
  with jax.set_mesh(experiment.mesh), cli.refusals():
    if experiment.evaluation.every:
      found, samples = make_evaluator(experiment)(params)
    found |= row_metrics(experiment, params, _anchors(experiment))
  if samples:
    metrics.show_samples('held out, greedy', samples[: experiment.show_samples])
  print(json.dumps(found, indent=2))


if __name__ == '__main__':
  cli.run(main)
