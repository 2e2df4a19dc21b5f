"""From configuration to objects: an experiment is one part, and its sections are parts of it.

    part(experiment, model=part(decoder, ...), phases={'rl': part(phase, ...)}, order=('rl',))

Everything that can be refused without compiling is refused here: unknown keys, names and types by
`bind`, and by `check` whatever only shows when the parts meet.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import jax
import ml_collections
import optax

from polgrad import collect, credit, objectives, optim, sharding
from polgrad.data import sources, tokenizers
from polgrad.models import Part as ModelPart
from polgrad.models.policy import Policy
from polgrad.registry import bind, suggest, table
from polgrad.rewards import scoring, verifiers
from polgrad.types import Layout


class Phase(NamedTuple):
  """One stage of a run: a data source, a way to collect, and an objective."""

  steps: int
  source: sources.Source
  shuffle: bool
  collect: collect.Collector
  score: Callable
  credit: credit.Estimator
  objective: objectives.Objective
  optimizer: optax.GradientTransformation
  epochs: int
  minibatches: int
  micro_batches: int
  anchors: Mapping[str, Callable]
  frozen: Mapping[str, Policy]
  restart: bool
  layout: Layout

  @property
  def rows_per_prompt(self) -> int:
    """Rows that stay together in every cut of a batch."""
    return max(self.objective.rows_per_prompt, self.layout.shared, 1)


def phase(
  *,
  steps: int = 100,
  source: sources.Part,
  collect: collect.Part,
  objective: objectives.Part,
  optimizer: optim.Part = optim.adamw,
  credit: credit.Part = credit.nothing,
  reward: Mapping[str, verifiers.Part] = {},
  verifier_timeout: float = 5.0,
  verifier_workers: int = 2,
  isolate_verifiers: bool = False,
  shuffle: bool = True,
  epochs: int = 1,
  minibatches: int = 1,
  micro_batches: int = 1,
  anchors: Mapping[str, optim.AnchorPart] = {},
  frozen: Mapping[str, ModelPart] = {},
  restart: bool = False,
  share_prompts: bool = False,
  pack: int = 0,
) -> Phase:
  """Describes a phase.

  Args:
    steps: batches to collect; each is used for epochs * minibatches updates.
    reward: verifiers with their weights; their weighted sum is the reward.
    verifier_timeout: seconds for one verifier on one row, when isolated.
    isolate_verifiers: run verifiers in `verifier_workers` processes that are killed when they hang.
    micro_batches: pieces that a minibatch is forwarded in; changes memory, not the result.
    anchors: parameter sets by name (reference, teacher, ...) and how they follow the policy; each
      begins as a copy of the policy at the start of the phase, or as the `frozen` model of its name.
    frozen: models of their own for some of the anchors, such as a larger teacher.
    restart: re-initialise the policy when the phase begins, after its anchors were copied.
    share_prompts: forward the prompt of a group once. Changes speed and memory, not the result, but
      groups then stay whole in minibatches, which must divide accordingly.
    pack: forward short rows several to a row; changes speed and memory, not the result. Their number,
      and how many tokens of one are scored, are rounded up to one of so many values; each pair is
      compiled when it first comes. 0 forwards rows as they are.
  """
  return Phase(
    steps=steps,
    source=source,
    shuffle=shuffle,
    collect=collect,
    score=scoring.make_scorer(
      reward, timeout_s=verifier_timeout, workers=verifier_workers, isolate=isolate_verifiers
    ),
    credit=credit,
    objective=objective,
    optimizer=optimizer,
    epochs=epochs,
    minibatches=minibatches,
    micro_batches=micro_batches,
    anchors=anchors,
    frozen=frozen,
    restart=restart,
    layout=Layout(collect.prompt_length, collect.rows_per_prompt if share_prompts else 1, pack),
  )


class Evaluation(NamedTuple):
  """What to measure on held-out problems, and how often."""

  every: int
  source: sources.Source | None = None
  score: Callable | None = None
  problems: int = 0
  batch: int = 0
  prompt_length: int = 0
  max_new_tokens: int = 0
  samples: int = 0
  temperature: float = 1.0
  threshold: float = 1.0
  answer: str = ''


def never() -> Evaluation:
  """No evaluation."""
  return Evaluation(every=0)


def held_out(
  *,
  every: int = 50,
  source: sources.Part,
  reward: Mapping[str, verifiers.Part],
  problems: int = 200,
  batch: int = 100,
  prompt_length: int = 64,
  max_new_tokens: int = 64,
  samples: int = 0,
  temperature: float = 1.0,
  threshold: float = 1.0,
  answer: str = '(?s)(.*)',
) -> Evaluation:
  """Accuracy on the first `problems` rows of a source, greedy and (if asked for) sampled.

  Args:
    every: collected batches between evaluations; each phase is also measured before and after.
    batch: problems decoded at once.
    samples: completions a problem for pass@k and maj@k; 0 measures greedy decoding only.
    threshold: the least reward that counts as solved.
    answer: what two completions must share to be one answer of a vote: the last match's first group.
  """
  return Evaluation(
    every=every,
    source=source,
    score=scoring.make_scorer(reward),
    problems=problems,
    batch=batch,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    samples=samples,
    temperature=temperature,
    threshold=threshold,
    answer=answer,
  )


EvaluationPart = Annotated[Evaluation, table('build', never, held_out)]
PhasePart = Annotated[Phase, table('build', phase)]
MeshPart = Annotated[jax.sharding.Mesh, table('sharding', sharding.make_mesh)]


class Experiment(NamedTuple):
  """Everything that a run needs."""

  seed: int
  tokenizer: tokenizers.Tokenizer
  policy: Policy
  mesh: jax.sharding.Mesh
  phases: Mapping[str, Phase]
  order: tuple[str, ...]
  evaluation: Evaluation
  checkpoint_every: int
  keep_checkpoints: int
  log_every: int
  show_samples: int
  samples_every: int
  tensorboard: bool
  max_skipped: int


def experiment(
  *,
  seed: int = 0,
  tokenizer: tokenizers.Part,
  model: ModelPart,
  mesh: MeshPart = sharding.make_mesh,
  phases: Mapping[str, PhasePart],
  order: tuple,
  evaluation: EvaluationPart = never,
  checkpoint_every: int = 100,
  keep_checkpoints: int = 2,
  log_every: int = 1,
  show_samples: int = 4,
  samples_every: int = 50,
  tensorboard: bool = True,
  max_skipped: int = 5,
) -> Experiment:
  """Describes a run.

  Args:
    order: the names of `phases`, in the order in which they run.
    checkpoint_every, log_every, samples_every: in collected batches.
    show_samples: rows of the table of sampled completions.
    max_skipped: stop after so many updates in a row whose loss or gradient was not finite.
  """
  return Experiment(
    seed=seed,
    tokenizer=tokenizer,
    policy=model,
    mesh=mesh,
    phases={
      name: one._replace(
        optimizer=optim.balanced(one.optimizer, model.labels, rate=model.config.balance_rate)
      )
      for name, one in phases.items()
    },
    order=tuple(order),
    evaluation=evaluation,
    checkpoint_every=checkpoint_every,
    keep_checkpoints=keep_checkpoints,
    log_every=log_every,
    show_samples=show_samples,
    samples_every=samples_every,
    tensorboard=tensorboard,
    max_skipped=max_skipped,
  )


def build(config: ml_collections.ConfigDict | Mapping) -> Experiment:
  """Turns a configuration into an experiment, or refuses it before anything compiles.

  Raises:
    ValueError, TypeError: names the field at fault and the valid choices.
    FileNotFoundError: a data, tokenizer or model file is missing.
  """
  result = bind(config, table('build', experiment))
  check(result)
  return result


def check(run: Experiment) -> None:
  """Refuses parts that do not fit each other."""
  if sorted(run.order) != sorted(run.phases) or len(set(run.order)) != len(run.order):
    raise ValueError(f'config.order: {run.order} must name each of {sorted(run.phases)} once')
  vocabulary = run.policy.config.vocab_size
  if run.tokenizer.vocab_size > vocabulary:
    raise ValueError(
      f'config.model: its vocab_size {vocabulary} is smaller than that of config.tokenizer, '
      f'{run.tokenizer.vocab_size}'
    )
  for name, one in run.phases.items():
    _check_phase(f'config.phases.{name}', one, run)
  evaluation = run.evaluation
  if evaluation.every:
    length = evaluation.prompt_length + evaluation.max_new_tokens
    _check_length('config.evaluation', length, run.policy)


def _check_phase(path: str, phase: Phase, run: Experiment) -> None:
  collector = phase.collect
  _check_length(f'{path}.collect', collector.length, run.policy)
  data_parallel_size = sharding.data_parallel_size(run.mesh)
  if phase.layout.shared > 1 and not phase.layout.prompt_length:
    raise ValueError(
      f'{path}.share_prompts: this collect has no rows with one prompt; groups of rollouts have, '
      'and preferences with a prompt_length'
    )
  if phase.layout.pack < 0 or (phase.layout.pack and phase.layout.shared > 1):
    raise ValueError(
      f'{path}.pack: {phase.layout.pack} must be at least 0, and 0 with share_prompts: a prompt of '
      'several rows stands in none of them'
    )
  compared, rows_per_prompt = max(phase.objective.rows_per_prompt, 1), phase.rows_per_prompt
  if collector.rows % compared or (
    collector.rows_per_prompt % compared and collector.rows_per_prompt != 1
  ):
    raise ValueError(
      f'{path}.collect: groups of {collector.rows_per_prompt} rows, but the objective compares '
      f'{compared}'
    )
  piece = phase.minibatches * phase.micro_batches * data_parallel_size
  if collector.rows % (piece * rows_per_prompt):
    raise ValueError(
      f'{path}: {collector.rows} rows do not divide into {phase.minibatches} minibatches x '
      f'{phase.micro_batches} micro_batches x {data_parallel_size} devices x groups of {rows_per_prompt}'
    )
  if collector.records % data_parallel_size:
    raise ValueError(
      f'{path}.collect: {collector.records} records do not divide by {data_parallel_size} devices'
    )
  if 'stream' in collector.provides and isinstance(phase.objective, objectives.WeightedSum):
    phase.objective.check_streams(f'{path}.objective.streams')
  wanted = phase.objective.requires | phase.credit.requires
  provided = collector.provides | phase.credit.provides
  anchors = {f: f.rsplit('_', 1)[0] for f in wanted - provided if f.endswith(('_logp', '_logits'))}
  anchors = {f: a for f, a in anchors.items() if a not in ('behavior', 'proximal')}
  for field, anchor in sorted(anchors.items()):
    if anchor not in phase.anchors:
      raise ValueError(
        f'{path}.anchors: {field} is read, so an anchor {anchor!r} is needed; '
        f'there are {sorted(phase.anchors)}'
      )
  for anchor in sorted(collector.anchors_read - phase.anchors.keys()):
    raise ValueError(f'{path}.anchors: the behavior policy needs an anchor {anchor!r}')
  for name in sorted(phase.frozen.keys() - phase.anchors.keys()):
    raise ValueError(f'{path}.frozen: {name!r} is no anchor; there are {sorted(phase.anchors)}')
  if wanted & {'values', 'old_values'} and not run.policy.config.value_head:
    raise ValueError(f'{path}: values are read, but config.model.value_head is False')
  given = provided | anchors.keys() | {'entropy', 'values', 'old_values', 'weights'}
  missing = sorted(wanted - given)
  objectives.check_reads(f'{path}.objective', phase.objective, missing, given)
  if missing:
    raise ValueError(
      f'{path}: the objective reads {missing}, which neither collect ({sorted(collector.provides)}) '
      f'nor credit ({sorted(phase.credit.provides)}) provides{suggest(missing[0], given)}'
    )
  if collector.filtered and wanted & {'proximal_logp', 'advantages'}:
    raise ValueError(
      f'{path}.collect: top_k, top_p or a role other than current sample from another distribution '
      'than the policy, so its log-probs are not those of the samples; set recompute_proximal=True '
      "to go on with the policy's own"
    )


def _check_length(path: str, length: int, policy: Policy) -> None:
  if length > policy.config.max_length:
    raise ValueError(
      f'{path}: rows of {length} tokens, but config.model.max_length is {policy.config.max_length}'
    )
