"""From configuration to objects: an experiment is one part, and its sections are parts of it.

    part(Experiment, model=part(decoder, ...), phases={'train': part(Phase, ...)}, order=('train',))

What can be refused without compiling is refused here: unknown keys, names and types by `bind`, and
parts that do not fit each other by `check`. `check_data` reads a few records of every source, so that
a prompt that does not fit is found before the first step.
"""

import collections
import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import ml_collections
import numpy as np

from polgrad import (
  collect,
  curricula,
  exchanges,
  objectives,
  optim,
  reward_models,
  sharding,
  teachers,
)
from polgrad import credit as credits
from polgrad import trackers as tracking
from polgrad.arrays import OWNED
from polgrad.checks import answers, duplicates, tracing
from polgrad.checks.findings import Finding, reader_field, source_field
from polgrad.collect import influences
from polgrad.data import batching, chat, sources, tokenizers
from polgrad.learner import (
  AnchorLearner,
  FurtherLearner,
  Learned,
  LearnedPart,
  Learner,
  NetworkLearner,
  NetworkPart,
)
from polgrad.models import Part as ModelPart
from polgrad.models.heads import with_head
from polgrad.models.kernels import ATTENTION, PLATFORMS
from polgrad.models.policy import Policy
from polgrad.registry import (
  AtLeastOne,
  Count,
  NotNegative,
  Positive,
  Range,
  bind,
  inputs,
  part,
  suggest,
  table,
  unbound,
)
from polgrad.rewards import combinations, comparisons, scoring, spans
from polgrad.sampling import behavior_policies, engines, stopping
from polgrad.types import Layout, Prompts

CHECKED = 64  # records of a generated source that are laid out before a run
CHECKED_OF_FILES = 20_000  # records of a file, which may be of any length
TRIED = 4  # records on which verifiers are tried
HINT = '; a wrong completion should get a low number, not an error'
VALUES = frozenset({'values', 'values_after', 'old_values'})  # what needs the model's scalar head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """Verifiers and the limits that they run under; `rewards/worker.py` says what these keep out.

  Attributes:
    reward: verifiers with their weights.
    combine: how their numbers become the reward; by default it is their weighted sum. The
      reward of an environment is added to the result.
    comparison: which of two completions is better, for a collector that compares. By default it is the
      one with the larger reward, with the probability of Bradley and Terry.
    isolate_verifiers: run verifiers in processes that are killed when they hang, except those of
      polgrad that need none.
    verifier_timeout: seconds for one isolated verifier on one row.
    verifier_workers: processes of isolated verifiers.
    verifier_memory: GiB of address space of each of these processes; 0: no limit.
  """

  reward: Mapping[str, reward_models.Part] = dataclasses.field(default_factory=dict)
  combine: combinations.Part = combinations.weighted_sum
  comparison: reward_models.ComparisonPart = comparisons.by_reward
  isolate_verifiers: bool = True
  verifier_timeout: Positive = 5.0
  verifier_workers: AtLeastOne = 2
  verifier_memory: NotNegative = 4.0

  @functools.cached_property
  def score(self) -> Callable:
    """(completions, records, lengths, others) -> `Scores`, see `scoring.make_scorer`."""
    return scoring.make_scorer(self.reward, combine=self.combine, **self.limits)

  @functools.cached_property
  def compare(self) -> Callable:
    """(pairs, others) -> `Compared`, see `scoring.make_comparer`."""
    return scoring.make_comparer(self.comparison, **self.limits)

  @property
  def limits(self) -> dict[str, float]:
    """What isolated verifiers may use."""
    return dict(
      timeout_s=self.verifier_timeout,
      workers=self.verifier_workers,
      memory_gib=self.verifier_memory,
      isolate=self.isolate_verifiers,
    )

  def judge(
    self, texts: Sequence[str], records: Sequence[Mapping], tokenizer: tokenizers.Tokenizer
  ) -> scoring.Scores:
    """The scores of completions that nobody sampled, such as the answers in the data."""
    tokens = [tokenizer.encode(text) for text in texts]
    others = {
      'prompt': lambda: [batching.prompt_text(record, tokenizer) for record in records],
      'tokens': lambda: tokens,
    }
    lengths = [len(ids) + 1 for ids in tokens]  # with the stop token
    return self.score(texts, records, lengths, others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase(Judged):
  """One stage of a run: a data source, a way to collect batches, and an objective.

  Attributes:
    steps: batches to collect; each is used for epochs * minibatches updates.
    plateau: the phase ends earlier if the mean of `plateau_metric` over this number of batches is no
      larger than over as many before them; 0: it makes all its steps.
    plateau_metric: a metric of every step, such as `reward`.
    source: where records come from.
    collect: from records to a batch.
    objective: the loss.
    spans: scores of parts of completions, for a collector that asks for them (`spans=True`). By default
      the completion is one part, with the reward of its row.
    optimizer: what makes a step of its gradient.
    credit: from rewards to advantages, returns or labels.
    shuffle: draw records in an order that changes with each epoch.
    curriculum: which records a step draws (docs/curricula.md); by default the next ones of the epochs.
    epochs: passes over a collected batch.
    minibatches: updates in each pass.
    micro_batches: pieces that a minibatch is forwarded in; changes memory, not the result.
    anchors: parameter sets by name (reference, teacher, ...) and how they follow the policy. Each starts
      as a copy of the policy at the start of the phase, or as the `frozen` model of its name.
    learned: anchors, whose rule is `fixed`, that learn by their own loss, such as a reward model.
    networks: networks that score hidden states and learn by their own loss; the array `NAME_scores`.
    further: further updates of the policy after those of a step, by the name of the batch that the
      collector makes for them, each with its objective and optimizer, whose states are kept.
    frozen: other models that some of the anchors are, such as a larger teacher.
    elsewhere: models by name that are not on the devices of the run: on others of the process, or behind
      a service. They take the place of frozen anchors that nothing is sampled from, see `teachers`.
    restart: initialise the policy again when the phase starts, after its anchors were copied.
    share_prompts: forward the prompt of a group once. Changes speed and memory, not the result, but
      groups then stay whole in minibatches, which must divide accordingly.
    held_out: sources by name of records that are not trained on, for phases that learn from given
      completions. The loss and metrics of the objective on them are `evaluation/NAME/...`.
    held_out_every: collected batches between these measurements; the phase is also measured before and
      after.
    held_out_records: how many records of each of these sources are measured, from the first.
    pack: 0 turns packing off; otherwise short rows are forwarded several to a row, and the numbers of
      packed rows and of scored tokens are each rounded up to one of `pack` sizes, so few shapes compile.
  """

  steps: AtLeastOne = 100
  plateau: Count = 0
  plateau_metric: str = 'reward'
  source: sources.Part
  collect: collect.Part
  objective: objectives.Part
  spans: reward_models.SpansPart = spans.whole
  optimizer: optim.Part = optim.adamw
  credit: credits.Part = credits.nothing
  shuffle: bool = True
  curriculum: curricula.Part = curricula.epochs
  epochs: AtLeastOne = 1
  minibatches: AtLeastOne = 1
  micro_batches: AtLeastOne = 1
  anchors: Mapping[str, optim.AnchorPart] = dataclasses.field(default_factory=dict)
  learned: Mapping[str, LearnedPart] = dataclasses.field(default_factory=dict)
  networks: Mapping[str, NetworkPart] = dataclasses.field(default_factory=dict)
  further: Mapping[str, LearnedPart] = dataclasses.field(default_factory=dict)
  frozen: Mapping[str, ModelPart] = dataclasses.field(default_factory=dict)
  elsewhere: Mapping[str, teachers.Part] = dataclasses.field(default_factory=dict)
  restart: bool = False
  share_prompts: bool = False
  pack: Count = 0
  held_out: Mapping[str, sources.Part] = dataclasses.field(default_factory=dict)
  held_out_every: Count = 50
  held_out_records: AtLeastOne = 256

  @functools.cached_property
  def layout(self) -> Layout:
    """What of a batch need not be computed."""
    shared = self.collect.rows_per_prompt if self.share_prompts else 1
    return Layout(self.collect.prompt_length, shared, self.pack)

  @functools.cached_property
  def mark(self) -> Callable:
    """(completions, records, lengths, rewards, others) -> `Marked`, see `scoring.make_marker`."""
    return scoring.make_marker(self.spans, **self.limits)

  def begin(self) -> None:
    """Starts in the background the processes that a step needs.

    They are those of verifiers, of the comparison and of the scores of parts, each for the rows that
    this process judges, and those of the environment.
    """
    rows = self.collect.rows
    judged = len(exchanges.strided(range(rows)))
    for one in (self.score, self.compare, self.mark):
      one.begin(judged)
    self.collect.begin(rows)

  def learner(self, policy: Policy) -> Learner:
    """The forward pass, gradient and update of this phase."""
    return Learner(
      policy,
      self.objective,
      self.optimizer,
      temperature=self.collect.temperature,
      micro_batches=self.micro_batches,
      anchors=self.anchors,
      frozen=self.frozen,
    )

  def anchor_learners(self, policy: Policy) -> dict[str, AnchorLearner]:
    """The updates of the anchors that learn, by name."""
    return {
      name: AnchorLearner(name, self._other(policy, one)) for name, one in self.learned.items()
    }

  def further_learners(self, policy: Policy) -> dict[str, FurtherLearner]:
    """The further updates of the policy, by name."""
    return {
      name: FurtherLearner(name, self._other(policy, one)) for name, one in self.further.items()
    }

  def _other(self, policy: Policy, one: Learned) -> Learner:
    """A learner with another objective and optimizer."""
    return Learner(
      policy,
      one.objective,
      one.optimizer,
      temperature=self.collect.temperature,
      micro_batches=self.micro_batches,
    )

  def network_learners(self, policy: Policy) -> dict[str, NetworkLearner]:
    """The networks that score hidden states, by name."""
    return {
      name: NetworkLearner(
        name=name,
        policy=self.frozen.get(one.states_of, policy),
        states_of=one.states_of,
        network=one.network,
        optimizer=one.optimizer,
        frozen=self.frozen,
        micro_batches=self.micro_batches,
      )
      for name, one in self.networks.items()
    }

  @property
  def rows_per_prompt(self) -> int:
    """Consecutive rows that stay together in every cut of a batch."""
    compared = [one.objective.rows_together for one in (self, *self.learned.values())]
    return max(*compared, self.layout.shared, 1)


class Evaluation:
  """What to measure on held-out problems; `every` counts collected batches, 0 is never."""

  every: int = 0

  def in_phase(self, name: str) -> 'Evaluation':
    """What is measured in the phase of this name."""
    del name
    return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Never(Evaluation):
  """No evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut(Judged, collect.Turns, Evaluation):
  """Accuracy on the first `problems` rows of a source, greedy and, if asked for, sampled.

  Attributes:
    every: collected batches between evaluations; each phase is also measured before and after.
    source: where the problems come from.
    problems: how many problems.
    batch: problems that are decoded at once.
    prompt_length: tokens that prompts are padded to.
    max_new_tokens: longest completion.
    samples: completions of a problem for pass@k and maj@k; 0 measures greedy decoding only.
    temperature: of the sampled completions.
    threshold: the least reward that counts as solved.
    answer: regular expression; maj@k compares the first group of its last match.
    overlong: of problems whose prompt is longer: 'error', 'drop' or 'truncate', see `collect.Collector`.
    prefix, stop_strings: what completions begin and end with, see `collect.Sampling`.
    label: text before all other tokens of every prompt, such as that of the best quantile (Quark); ''
      is none. Verifiers do not see it.
    label_length: tokens of the label, at most; `prompt_length` has room for them.
    label_phases: names of the phases whose policy is asked behind the label; () is all. Others, such as
      a warm start, have not learned labels.
    environment: what answers the turns of the policy, with its budgets and limits; the one of training
      may be another.
    anchors: anchors that are measured as well, in phases that have them, such as an average of the
      policy; their metrics are `evaluation_NAME/...`.
    comparison: which of two completions is better, for `polgrad.compare`; by default the one with the
      larger reward.
  """

  every: Count = 50
  source: sources.Part
  problems: AtLeastOne = 200
  batch: AtLeastOne = 100
  prompt_length: AtLeastOne = 64
  max_new_tokens: AtLeastOne = 64
  samples: Count = 0
  temperature: Positive = 1.0
  threshold: float = 1.0
  answer: str = '(?s)(.*)'
  overlong: batching.Overlong = 'error'
  prefix: str = ''
  stop_strings: tuple = ()
  label: str = ''
  label_length: Count = 0
  label_phases: tuple = ()
  anchors: tuple = ()
  comparison: reward_models.ComparisonPart = comparisons.larger_reward

  def own(self, tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with this prefix and these stop strings."""
    return tokenizer.sampling(self.prefix, self.stop_strings)

  def check_texts(self, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses a label that the tokenizer cannot write, or that has too many tokens."""
    batching.check_text('label', self.label, tokenizer)
    batching.check_label(tokenizer.encode(self.label), self.label_length)

  def in_phase(self, name: str) -> 'HeldOut':
    """What is measured in the phase of this name."""
    asks_behind = not self.label_phases or name in self.label_phases
    return self if asks_behind else dataclasses.replace(self, label='')

  def lay_out(
    self, records: Sequence[dict], *, tokenizer: tokenizers.Tokenizer, cut: bool = False
  ) -> Prompts:
    """The prompts of these problems, each of which has an `id`."""
    records, tokenizer = self.opened(records), self.own(tokenizer)
    length = self.prompt_length - self.label_length
    found = batching.prompts(records, tokenizer, length=length, cut=cut)
    if not self.label:
      return batching.widened(found, self.label_length, tokenizer.pad_id)
    ids = tokenizer.encode(self.label)
    return batching.behind(batching.widened(found, self.label_length, tokenizer.pad_id), ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """Which rows a run keeps on disk, in WORKDIR/rollouts and WORKDIR/evaluations.

  Attributes:
    every: collected batches between files of rows; the first and the last batch of a phase have one too.
      0 keeps nothing, also of evaluations.
    rows: rows of a file, rounded up to whole groups; of a batch these are the first ones.
    limit_mib: MiB that the files of each of the two folders may have; beyond it the oldest are deleted.
  """

  every: Count = 10
  rows: AtLeastOne = 16
  limit_mib: Positive = 64.0


PhasePart = Annotated[Phase, table('build', Phase)]
EvaluationPart = Annotated[Evaluation, table('build', Never, HeldOut)]
KeepPart = Annotated[Keep, table('build', Keep)]
MeshPart = Annotated[jax.sharding.Mesh, table('sharding', sharding.make_mesh)]
SamplerMeshPart = Annotated[Callable, table('sharding', sharding.shared, sharding.beside)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything that a run needs.

  Attributes:
    seed: of parameters, data order and sampling.
    tokenizer: between texts and token ids.
    model: the policy.
    mesh: the devices that train.
    sampler_mesh: the devices on which rollouts are sampled: the same ones, or others beside them.
    engine: what draws rollouts: polgrad's sampler, or vLLM. Held-out problems are always polgrad's.
    phases: stages by name.
    order: the names of `phases`, in the order in which they run.
    evaluation: what is measured on held-out problems.
    checkpoint_every: collected batches between checkpoints.
    keep_checkpoints: how many checkpoints are kept.
    keep_best: metric whose best checkpoint in the last phase is kept beside these, such as
      `evaluation/greedy`; '' for none. It is measured, and the checkpoint saved, where the metric is
      reported. `--step=best` reads this checkpoint.
    best_is: 'max' or 'min', the best value of `keep_best`.
    patience: measurements of `keep_best` without a better value after which the run ends; 0: never.
    log_every: collected batches between rows of metrics.
    show_samples: rows of the table of sampled completions.
    samples_every: collected batches between these tables.
    rollouts: which rows are kept on disk, for `polgrad.view` and `polgrad.inspect`.
    trackers: by name, where metrics go besides metrics.jsonl.
    max_skipped: consecutive updates with a non-finite loss or gradient after which the run stops.
    max_silent: consecutive collected batches without any gradient after which the run stops, for
      example because all rewards of each group are equal; 0 only warns. Where every verifier fails, a
      run stops after 10 of them in any case.
  """

  seed: Annotated[int, Range(at_least=0, below=2**31)] = 0
  tokenizer: tokenizers.Part
  model: ModelPart
  mesh: MeshPart = sharding.make_mesh
  sampler_mesh: SamplerMeshPart = sharding.shared
  engine: engines.Part = engines.Own
  phases: Mapping[str, PhasePart]
  order: tuple
  evaluation: EvaluationPart = Never
  checkpoint_every: Count = 100
  keep_checkpoints: AtLeastOne = 2
  keep_best: str = ''
  best_is: Literal['max', 'min'] = 'max'
  patience: Count = 0
  log_every: Count = 1
  show_samples: Count = 4
  samples_every: Count = 50
  rollouts: KeepPart = Keep
  trackers: Mapping[str, tracking.Part] = dataclasses.field(
    default_factory=lambda: {'tensorboard': part(tracking.tensorboard)}
  )
  max_skipped: AtLeastOne = 5
  max_silent: Count = 0

  @property
  def policy(self) -> Policy:
    return self.model

  @functools.cached_property
  def sampled_on(self) -> jax.sharding.Mesh:
    """The mesh of `sampler_mesh`.

    Raises:
      ValueError: it does not fit the devices behind those of `mesh`.
    """
    try:
      return self.sampler_mesh(self.mesh)
    except ValueError as error:
      raise ValueError(f'config.sampler_mesh: {error}') from error


TABLE = table('build', Experiment)


def build(config: ml_collections.ConfigDict | Mapping) -> Experiment:
  """Turns a configuration into an experiment, or refuses it before anything compiles.

  Raises:
    ValueError, TypeError: names the field at fault and the valid choices.
    FileNotFoundError: a data, tokenizer or model file is missing.
  """
  run = bind(config, TABLE)
  run = dataclasses.replace(run, model=_with_head(run, origin(config['model'])))
  model = run.model
  balanced = functools.partial(optim.balanced, labels=model.labels, rate=model.config.balance_rate)
  others = lambda several: {
    k: dataclasses.replace(one, optimizer=balanced(one.optimizer)) for k, one in several.items()
  }
  phases = {
    name: dataclasses.replace(
      _with_unembeddings(f'config.phases.{name}', phase),
      optimizer=balanced(phase.optimizer),
      learned=others(phase.learned),
      further=others(phase.further),
    )
    for name, phase in run.phases.items()
  }
  run = dataclasses.replace(run, phases=phases)
  check(run)
  for name, phase in config['phases'].items():
    for anchor, model in (phase.get('frozen') or {}).items():
      if folder := origin(model):
        where = f'config.phases.{name}.frozen.{anchor}'
        tokenizers.check_same(run.tokenizer, folder, where)
  return run


def origin(model: Mapping) -> str:
  """The Hugging Face folder whose weights a model configuration starts from; '' if it names none."""
  return origin(model['base']) if 'base' in model else model.get('path', '')


def head(run: Experiment) -> objectives.Head | None:
  """The head of the run's reward model that has parameters; None if there is none.

  Raises:
    ValueError: two phases have different ones.
  """
  found = {name: phase.objective.head for name, phase in run.phases.items()}
  found = {name: one for name, one in found.items() if one.makes}
  if len(set(found.values())) > 1:
    raise ValueError(
      f'config.phases: {sorted(found)} have objectives with different heads, but a model has one'
    )
  return next(iter(found.values()), None)


def _with_head(run: Experiment, folder: str) -> Policy:
  """The model of a run, with the parameters of the head of its objective."""
  found = head(run)
  return run.model if found is None else with_head(run.model, found.init, folder)


def fingerprints(run: Experiment) -> dict[str, str]:
  """What changes with the contents of data that are no files (of the hub), by place of their source."""
  found = {f'config.phases.{n}.source': p.source.fingerprint for n, p in run.phases.items()}
  return {place: text for place, text in found.items() if text}


def check(run: Experiment) -> None:
  """Refuses parts that do not fit each other."""
  if not all(isinstance(name, str) for name in run.order) or sorted(run.order) != sorted(
    run.phases
  ):
    raise ValueError(f'config.order: {run.order} must name each of {sorted(run.phases)} once')
  vocabulary = run.policy.config.vocab_size
  if run.tokenizer.vocab_size > vocabulary:
    raise ValueError(
      f'config.model: its vocab_size {vocabulary} is smaller than that of config.tokenizer, '
      f'{run.tokenizer.vocab_size}'
    )
  chat.check_written(run.tokenizer.chat, 'config.tokenizer')
  _check_kernel('config.model', run.model, run.mesh)
  _check_idle(run)
  if run.sampled_on is not run.mesh and not any(
    isinstance(phase.collect, collect.Sampling) and phase.collect.samples_apart
    for phase in run.phases.values()
  ):
    raise ValueError(
      'config.sampler_mesh: no phase samples rollouts, so nothing uses its devices; remove it'
    )
  _check_cut('config.model', run.model, run.mesh, 'config.mesh')
  if run.sampled_on is not run.mesh:
    _check_cut('config.model', run.model, run.sampled_on, 'config.sampler_mesh')
  for name, one in run.phases.items():
    one.score, one.compare, one.mark  # refuse verifiers that cannot run  # noqa: B018
    _check_phase(f'config.phases.{name}', one, run)
  evaluation = run.evaluation
  if evaluation.every:
    for name in evaluation.label_phases:
      if name not in run.phases:
        known = suggest(str(name), run.phases)
        raise ValueError(f'config.evaluation.label_phases: unknown {name!r}{known}')
    _check_stops('config.evaluation', evaluation, run)
    _check_environment('config.evaluation', evaluation, evaluation.reward, run)
    length = evaluation.prompt_length + evaluation.max_new_tokens
    _check_length('config.evaluation', length, run.policy)
    _check_measured(evaluation.anchors, run)
  _check_best(run)


def _check_measured(names: tuple, run: Experiment) -> None:
  """Refuses anchors to measure that no phase has, or that are other models."""
  known = {name for phase in run.phases.values() for name in phase.anchors.keys() - phase.frozen}
  for name in names:
    if name not in known:
      raise ValueError(f'config.evaluation.anchors: unknown {name!r}{suggest(str(name), known)}')


def _check_plateau(path: str, phase: Phase) -> None:
  """Refuses a plateau of a metric that cannot decide, or that no step could see."""
  name = phase.plateau_metric
  if not phase.plateau:
    return
  if name.partition('/')[0] in tracking.OF_THE_CLOCK:
    raise ValueError(f'{path}.plateau_metric: {name} depends on the clock')
  if name.startswith('evaluation'):
    raise ValueError(f'{path}.plateau_metric: {name} is not measured in every step')


def _check_best(run: Experiment) -> None:
  """Refuses a best checkpoint of a metric that cannot decide, and patience without one."""
  name = run.keep_best
  if run.patience and not name:
    raise ValueError('config.patience: name the metric that must improve with config.keep_best')
  if name.partition('/')[0] in tracking.OF_THE_CLOCK:
    raise ValueError(f'config.keep_best: {name} depends on the clock')
  last = [run.phases[phase] for phase in run.order[-1:]]  # a bare model has no phase
  measured = run.evaluation.every or any(one.held_out and one.held_out_every for one in last)
  if name.startswith('evaluation') and not measured:
    raise ValueError(f'config.keep_best: {name} is not measured, because there is no evaluation')


def _check_unread(path: str, phase: Phase) -> None:
  """Refuses a comparison, or scores of parts, that the collector does not ask for."""
  collector = phase.collect
  compares = bool({'wins', 'baseline_wins'} & collector.provides)
  if not compares and unbound(phase.comparison) is not comparisons.by_reward:
    raise ValueError(
      f'{path}.comparison: nothing reads it; name what is compared, as in '
      f"{path}.collect.compare=('wins',)"
    )
  if 'span_ids' not in collector.provides and unbound(phase.spans) is not spans.whole:
    raise ValueError(
      f'{path}.spans: nothing reads it; a collector that scores parts has {path}.collect.spans=True'
    )


def _check_groups(path: str, phase: Phase, compared: int) -> None:
  """Refuses rows that nobody can compare, and groups of one row whose baseline is that row."""
  reads = phase.objective.requires | (phase.credit.scored if phase.credit.provides else set())
  if not phase.collect.grouped and (compared > 1 or 'group_ids' in reads):
    raise ValueError(
      f'{path}.collect: its rows are single ones of different prompts, so neither the objective nor '
      'credit can compare the rows of a group; leave out sample_first'
    )
  if (
    phase.collect.rows_per_prompt == 1
    and not phase.curriculum.pools
    and isinstance(phase.objective, objectives.PolicyGradient)
    and 'advantages' in phase.objective.requires
    and tracing.lone_advantages_are_zero(phase.credit)
  ):
    raise ValueError(
      f'{path}.collect.samples_per_prompt: 1, but the baseline of this credit is made of the rows of a '
      'prompt, so every advantage would be 0; take at least 2, or a method with another baseline, such '
      'as ppo (a critic) or reinforce_plus_plus (the batch)'
    )


def _check_phase(path: str, phase: Phase, run: Experiment) -> None:
  collector = phase.collect
  for kind in ('anchors', 'elsewhere', 'networks'):
    for name in getattr(phase, kind):
      if not name.isidentifier():
        raise ValueError(f'{path}.{kind}: {name!r} must be a name of letters, digits and _')
  if isinstance(collector, collect.Sampling):
    _check_stops(f'{path}.collect', collector, run)
    _check_environment(f'{path}.collect', collector, phase.reward, run)
  _check_length(f'{path}.collect', collector.length, run.policy)
  _check_plateau(path, phase)
  _check_rules(path, phase)
  _check_unread(path, phase)
  _check_sampler_mesh(path, collector, run)
  _check_pieces(path, phase, run.mesh)
  if isinstance(collector, collect.Sampling):
    run.engine.check(collector, f'{path}.collect')
    if collector.proposer:
      names = behavior_policies.models_read(
        getattr(collector, 'behavior_policy', behavior_policies.current)
      )
      with _placing(f'{path}.collect'):
        models = {name: phase.frozen.get(name, run.policy) for name in names}
        collector.proposer.check(models, names)
  _check_rows(path, phase, run)
  if 'stream' in collector.provides and isinstance(phase.objective, objectives.WeightedSum):
    phase.objective.check_streams(f'{path}.objective.streams')
  _check_groups(path, phase, max(phase.objective.rows_per_prompt, 1))
  _check_terms(path, phase)
  if phase.held_out and not isinstance(collector, collect.Given):
    raise ValueError(
      f'{path}.held_out: this phase samples its completions; held-out problems are measured by '
      'config.evaluation'
    )
  _check_curriculum(path, phase)
  _check_reads(path, phase, run)


def _check_rows(path: str, phase: Phase, run: Experiment) -> None:
  """Refuses rows that do not divide into what compares, splits or shares them."""
  collector, data_parallel_size = phase.collect, sharding.data_parallel_size(run.mesh)
  axes = _axes_that_cut(run.mesh, 'batch')
  if phase.layout.shared > 1 and not (phase.layout.prompt_length and collector.one_prompt):
    raise ValueError(
      f'{path}.share_prompts: this collect has no rows with one prompt; groups of rollouts have, '
      'and preferences with a prompt_length'
    )
  if phase.layout.pack < 0 or (phase.layout.pack and phase.layout.shared > 1):
    raise ValueError(
      f'{path}.pack: {phase.layout.pack} must be at least 0, and 0 with share_prompts: a prompt of '
      'several rows is in none of them'
    )
  compared, rows_per_prompt = max(phase.objective.rows_per_prompt, 1), phase.rows_per_prompt
  if collector.rows % compared or collector.rows_per_prompt % compared:
    raise ValueError(
      f'{path}.collect: groups of {collector.rows_per_prompt} rows, but the objective compares '
      f'{compared}'
    )
  piece = phase.minibatches * phase.micro_batches * data_parallel_size
  if collector.rows % (piece * rows_per_prompt):
    raise ValueError(
      f'{path}: {collector.rows} rows do not divide into {phase.minibatches} minibatches x '
      f'{phase.micro_batches} micro_batches x {data_parallel_size} devices ({axes}) x '
      f'groups of {rows_per_prompt}'
    )
  if collector.records % data_parallel_size:
    raise ValueError(
      f'{path}.collect: {collector.records} records do not divide by {data_parallel_size} devices, over '
      f'which rows are cut ({axes}); take a multiple of {data_parallel_size}, or fewer devices'
    )


def _check_idle(run: Experiment) -> None:
  """Refuses devices of a run of several processes that do nothing."""
  used = run.mesh.size + (0 if run.sampled_on is run.mesh else run.sampled_on.size)
  there = jax.device_count()
  if jax.process_count() > 1 and used < there:
    raise ValueError(
      f'config.mesh, config.sampler_mesh: the run uses {used} of the {there} devices of its '
      f'{jax.process_count()} processes; it must use all'
    )


def _check_sampler_mesh(path: str, collector: collect.Collector, run: Experiment) -> None:
  """Refuses devices for sampling that the rollouts do not fit, and overlap in several processes whose
  programs would run on the same devices."""
  if collector.overlaps and jax.process_count() > 1 and run.sampled_on is run.mesh:
    raise ValueError(
      f'{path}.collect.overlap: programs on a device must start in the same order in all processes, '
      'which sampling beside training does not keep; give sampling its devices, as in '
      '--config.sampler_mesh.name=sharding.beside --config.sampler_mesh.data=...'
    )
  if run.sampled_on is run.mesh:
    return
  if isinstance(collector, collect.Sampling) and not collector.samples_apart:
    raise ValueError(
      f'config.sampler_mesh: {path}.collect is {type(collector).__name__}, which samples on the devices '
      'that train; Rollouts can sample on others'
    )
  if isinstance(run.engine, engines.External):
    raise ValueError('config.sampler_mesh: config.engine samples on its own devices; leave out one')
  size = sharding.data_parallel_size(run.sampled_on)
  if isinstance(collector, collect.Sampling) and collector.records % size:
    raise ValueError(
      f'config.sampler_mesh: {path}.collect has {collector.records} records, which do not divide by its '
      f'{size} devices'
    )


def _check_curriculum(path: str, phase: Phase) -> None:
  """Refuses a curriculum that learns from what the phase does not give."""
  curriculum, collector = phase.curriculum, phase.collect
  reads = curriculum.reads | ({'features'} if curriculum.provides else set())
  if reads and isinstance(collector, collect.Given):
    raise ValueError(
      f'{path}.curriculum: it learns from the rewards of completions, but this phase samples none'
    )
  terms = phase.reward.keys() | collector.earned
  if unknown := sorted(curriculum.terms - terms):
    raise ValueError(
      f'{path}.curriculum.term: {unknown[0]!r} is no term of the reward{suggest(unknown[0], terms)}'
    )
  if reads and getattr(collector, 'chunk', 0):
    raise ValueError(
      f'{path}.curriculum: with collect.chunk a step may sample no batch or several, in an order that '
      'depends on speed, so it can learn from none; take chunk=0, or curricula.epochs'
    )
  if 'magnitudes' in reads and 'advantages' not in phase.credit.provides:
    raise ValueError(
      f'{path}.curriculum: it learns from advantages, but the credit of this phase makes none'
    )
  if curriculum.pools and not isinstance(collector, collect.Rollouts):
    raise ValueError(f'{path}.curriculum: only the collector Rollouts pools the groups of a prompt')
  pieces = phase.minibatches * phase.micro_batches
  if curriculum.pools and pieces > 1 and 'group_ids' in phase.objective.requires:
    raise ValueError(
      f'{path}.curriculum: the objective compares the rows of a group, but pooled groups may be cut; '
      'take minibatches=1 and micro_batches=1'
    )
  older = ('lag', 'replay', 'old_runs', 'sample_first')
  older = [name for name in older if getattr(collector, name, 0)]
  if curriculum.pools and {*older} - {'lag'}:
    raise ValueError(
      f'{path}.curriculum: it pools the groups of a prompt, but with collect.{older[-1]} a group may '
      'be replaced by one of another prompt'
    )
  if older and reads - {'rewards'}:
    raise ValueError(
      f'{path}.curriculum: it reads values of the rows that a step draws, but with '
      f'collect.{older[0]} a step trains on older rows'
    )


def _check_stops(path: str, sampling: collect.Sampling | HeldOut, run: Experiment) -> None:
  """Refuses stop strings that the sampler cannot find."""
  try:
    stopping.for_policy(sampling.own(run.tokenizer), run.policy)
  except ValueError as error:
    raise ValueError(f'{path}.{error}') from error


def _check_environment(
  path: str, turns: collect.Turns, reward: Mapping[str, Callable], run: Experiment
) -> None:
  """Refuses an environment that cannot run, or whose reward has the name of a verifier."""
  turns.check_turns(path)
  if not turns.has_environment:
    return
  if 'environment' in reward:
    raise ValueError(
      f'{path}.environment: its reward is called environment, so no verifier can have that name'
    )
  with _placing(f'{path}.environment'):
    turns.pool  # refuses one that cannot be sent to another process  # noqa: B018


@contextlib.contextmanager
def _placing(path: str) -> Iterator[None]:
  """Puts a place of the configuration before errors."""
  try:
    yield
  except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
    raise type(error)(f'{path}: {error}') from error


def _check_terms(path: str, phase: Phase) -> None:
  """Refuses names of terms of the reward that there are not."""
  collector = phase.collect
  terms = phase.reward.keys() | collector.earned
  unknown = sorted(collector.terms_ignored - terms)
  if unknown or (collector.terms_ignored and collector.terms_ignored >= terms):
    raise ValueError(
      f'{path}.collect: groups are compared without {sorted(collector.terms_ignored)}, which must be '
      f'some of the terms of the reward, {sorted(terms)}, and leave another'
    )
  unknown = sorted(collector.terms_read - terms)
  if unknown:
    raise ValueError(
      f'{path}.collect.terms: {unknown[0]!r} is no term of the reward{suggest(unknown[0], terms)}'
    )
  if collector.compares and not terms and 'first_reward' in inputs(phase.comparison):
    raise ValueError(
      f'{path}.comparison: it compares rewards, but {path}.reward has no verifier; name another '
      f'comparison: {sorted(reward_models.COMPARISONS)}'
    )


def _check_reads(path: str, phase: Phase, run: Experiment) -> None:
  """Refuses a phase in which nobody provides what objective or credit read."""
  collector = phase.collect
  wanted = phase.objective.requires | phase.credit.requires
  provided = collector.provides | phase.credit.provides | phase.curriculum.provides
  _check_networks(path, phase, wanted, provided)
  provided |= {f'{name}_scores' for name in phase.networks}
  read, endings = wanted - provided, ('_logp', '_logits', '_head_score')
  anchors = {f: f.removesuffix(end) for f in read for end in endings if f.endswith(end)}
  anchors = {f: a for f, a in anchors.items() if a not in ('behavior', 'proximal')}
  given_elsewhere = _check_elsewhere(path, phase, run, wanted)
  anchors = {f: a for f, a in anchors.items() if f not in given_elsewhere}
  for field, anchor in sorted(anchors.items()):
    if anchor not in phase.anchors:
      raise ValueError(
        f'{path}.anchors: {field} is read, so an anchor {anchor!r} is needed; '
        f'there are {sorted(phase.anchors)}'
      )
  for anchor in sorted(collector.anchors_read - phase.anchors.keys()):
    reader = 'collect.speculate' if anchor in getattr(collector, 'drafts', ()) else 'who samples'
    raise ValueError(
      f'{path}.anchors: {reader} needs an anchor {anchor!r}; there are {sorted(phase.anchors)}, and '
      f'--{path}.anchors.{anchor}.name=fixed adds it'
    )
  for name in sorted({*getattr(collector, 'drafts', ())} - phase.frozen.keys()):
    what = 'the policy' if name == 'policy' else 'a copy of the policy'
    raise ValueError(
      f'{path}.collect.speculate.model: {name!r} is {what}, so it proposes no faster than the policy '
      f'draws; name a smaller model by {path}.frozen.{name if name != "policy" else "draft"}, or set '
      f'--{path}.collect.speculate.name=FirstLayers'
    )
  _check_frozen(path, phase, run)
  scored = {f for f in anchors if f.endswith('_head_score')}
  learned = frozenset().union(*(one.objective.requires for one in phase.learned.values()))
  for name in sorted({anchors[f] for f in scored} & phase.frozen.keys()):
    raise ValueError(
      f'{path}.frozen: the scalar head of {name!r} is read, so it must be a copy of the policy'
    )
  if (scored or (wanted | learned) & VALUES) and not run.policy.config.value_head:
    raise ValueError(f'{path}: values are read, but config.model.value_head is False')
  given = provided | given_elsewhere | anchors.keys() | VALUES | {'entropy', 'group_ids', 'tokens'}
  given |= _check_contrasts(path, phase, run) | phase.objective.head.makes
  missing = sorted(wanted - given)
  objectives.check_reads(f'{path}.objective', phase.objective, missing, given)
  if missing:
    raise ValueError(
      f'{path}: objective or credit read {missing}, which neither collect '
      f'({sorted(collector.provides)}) nor credit ({sorted(phase.credit.provides)}) nor curriculum '
      f'({sorted(phase.curriculum.provides)}) provides{suggest(missing[0], given)}'
    )
  _check_learned(path, phase, given)
  _check_further(path, phase, run)
  if collector.filtered and wanted & {'proximal_logp', 'advantages'}:
    raise ValueError(
      f'{path}.collect: top_k, top_p, token_temperature or another behavior policy than '
      'current sample from another distribution than the policy, so its log-probs are not those of '
      'the samples; set '
      "recompute_proximal=True to use the policy's own"
    )


def _check_frozen(path: str, phase: Phase, run: Experiment) -> None:
  """Refuses frozen models that are no anchors, or that cannot read the rows of the phase."""
  for name in sorted(phase.frozen.keys() - phase.anchors.keys()):
    raise ValueError(f'{path}.frozen: {name!r} is no anchor; there are {sorted(phase.anchors)}')
  for name, model in sorted(phase.frozen.items()):
    _check_kernel(f'{path}.frozen.{name}', model, run.mesh)
    _check_cut(f'{path}.frozen.{name}', model, run.mesh, 'config.mesh')
    if phase.collect.length > model.config.max_length:
      raise ValueError(
        f'{path}.frozen.{name}: rows of {phase.collect.length} tokens, but its max_length is '
        f'{model.config.max_length}'
      )
    sizes = model.config.vocab_size, run.policy.config.vocab_size
    # Embeddings of one tokenizer may have different rows of padding, which no sampler may mix.
    sampled = name in phase.collect.anchors_read
    if (sizes[0] != sizes[1] and sampled) or sizes[0] < run.tokenizer.vocab_size:
      raise ValueError(
        f'{path}.frozen.{name}: its vocabulary has {sizes[0]} tokens, that of config.model {sizes[1]}; '
        'both must be of one tokenizer, and what samples from both needs one size'
      )


def _with_unembeddings(path: str, phase: Phase) -> Phase:
  """The phase, with the unembedding of a model elsewhere as an anchor where its logits are read.

  Raises:
    ValueError: a model elsewhere that is an anchor too.
  """
  for name, model in phase.elsewhere.items():
    if name in phase.anchors:
      raise ValueError(f'{path}.elsewhere: {name!r} is an anchor too; leave one of them out')
    if 'states' in teachers.entries_asked(name, model, _read_of_models(phase)):
      phase = dataclasses.replace(
        phase,
        anchors={**phase.anchors, name: optim.fixed},
        frozen={**phase.frozen, name: model.unembedding},
      )
  return phase


def _read_of_models(phase: Phase) -> frozenset[str]:
  """Names of the arrays that the losses of a phase read, its statistics included."""
  stats = getattr(phase.collect, 'stats', {}).values()
  return (phase.objective.requires | phase.credit.requires).union(*map(inputs, stats))


def _check_elsewhere(path: str, phase: Phase, run: Experiment, wanted: frozenset[str]) -> set[str]:
  """Refuses models elsewhere that nobody reads, or that do not give what is read.

  Returns the names of the arrays that they give.

  Args:
    wanted: arrays that objective and credit read.
  """
  read = _read_of_models(phase)
  for name, model in phase.elsewhere.items():
    if name in phase.collect.anchors_read:
      raise ValueError(
        f'{path}.elsewhere: rows are sampled with {name!r}, so it must be an anchor, on the devices of '
        'the run'
      )
    if f'{name}_logits' in read and 'states' not in model.entries:
      raise ValueError(
        f'{path}.elsewhere: the whole distribution of {name!r} is read, but a service lists some tokens '
        f'of it; take the divergence divergences.listed, put {name!r} on other devices with '
        'teachers.on_devices, or take a method that reads log-probs, such as sampled_distillation'
      )
    if not teachers.entries_asked(name, model, read):
      given = sorted(f'{name}_{array}' for array in teachers.GIVEN)
      raise ValueError(
        f'{path}.elsewhere: nothing reads any of {given}; there are {sorted(wanted)}'
      )
    where = f'{path}.elsewhere.{name}'
    teachers.check(model, run.tokenizer, phase.collect.temperature, where)
  return {f'{n}_{x}' for n, model in phase.elsewhere.items() for x in model.entries}


def _check_networks(
  path: str, phase: Phase, wanted: frozenset[str], provided: frozenset[str]
) -> None:
  """Refuses networks that nobody reads, that cannot learn, or that are not there.

  Args:
    wanted: arrays that objective and credit read.
    provided: arrays that the parts of the phase provide, apart from networks.
  """
  made = {f'{name}_scores' for name in phase.networks}
  scores = {x for x in wanted - provided if x.endswith('_scores') and x not in OWNED}
  for array in sorted(scores - made):
    raise ValueError(
      f'{path}.networks: {array} is read, so a network {array.removesuffix("_scores")!r} is needed; '
      f'there are {sorted(phase.networks)}'
    )
  if phase.networks and isinstance(phase.collect, collect.Given):
    raise ValueError(
      f'{path}.networks: they score completions that the phase samples, but it reads those of the data'
    )
  for name, one in phase.networks.items():
    place, array = f'{path}.networks.{name}', f'{name}_scores'
    if name in phase.anchors or array in OWNED | dict.fromkeys(provided):
      raise ValueError(f'{place}: the name, or the array {array}, is taken')
    if array not in wanted:
      raise ValueError(f'{place}: neither objective nor credit reads {array}')
    models = {'policy', *phase.anchors}
    if one.states_of not in models:
      raise ValueError(
        f'{place}.states_of: unknown {one.states_of!r}{suggest(one.states_of, models)}'
      )
    missing = sorted(one.network.requires - provided)
    if missing:
      raise ValueError(f'{place}: it reads {missing}, which is not in the batches of the phase')
    if phase.collect.rows % (one.minibatches * phase.micro_batches * phase.rows_per_prompt):
      raise ValueError(
        f'{place}: {phase.collect.rows} rows do not divide into {one.minibatches} minibatches x '
        f'{phase.micro_batches} micro_batches x groups of {phase.rows_per_prompt}'
      )


def _check_contrasts(path: str, phase: Phase, run: Experiment) -> set[str]:
  """Refuses credit that compares gradients which cannot be taken before it is assigned.

  Returns:
    The names of the arrays that this comparison makes.
  """
  contrasts = phase.credit.contrasts
  if contrasts is None:
    return set()
  if not isinstance(phase.objective, objectives.PolicyGradient):
    raise ValueError(
      f'{path}.credit: it compares gradients of rewards, so the objective must be '
      f'objectives.PolicyGradient, not {type(phase.objective).__name__}'
    )
  if not isinstance(phase.collect, collect.Sampling):
    raise ValueError(f'{path}.credit: it compares gradients of rewards, but nothing is sampled')
  also = sorted((phase.credit.provides - {'advantages', 'mask'}) & phase.objective.requires)
  if also:
    raise ValueError(
      f'{path}.objective: it reads {also} of credit, but gradients of rewards are compared before '
      'credit is assigned, with their advantages alone'
    )
  try:
    found = influences.chosen(run.policy, contrasts.parameters)
  except re.error as error:
    raise ValueError(f'{path}.credit.parameters: no regular expression: {error}') from error
  if not found:
    known = influences.chosen(run.policy, '')
    raise ValueError(
      f'{path}.credit.parameters: {contrasts.parameters!r} finds no parameter; there are {known}'
    )
  return {'influences'}


def _check_rules(path: str, phase: Phase) -> None:
  """Refuses a rule that follows an anchor which is not there."""
  for name, rule in phase.anchors.items():
    for other in sorted({*inputs(rule)} - {*optim.OF_POLICY} - phase.anchors.keys()):
      raise ValueError(
        f'{path}.anchors.{name}: its rule follows an anchor {other!r}, which is not there; there are '
        f'{sorted(phase.anchors)}'
      )


def _check_learned(path: str, phase: Phase, given: frozenset[str]) -> None:
  """Refuses anchors that learn, if they are none, follow the policy too, or read what is not there.

  Args:
    given: names of the arrays of a batch and of the model's outputs.
  """
  for name, one in phase.learned.items():
    rule = phase.anchors.get(name)
    if rule is None or unbound(rule) is not optim.fixed or name in phase.frozen:
      raise ValueError(
        f'{path}.learned: {name!r} must be an anchor whose rule is optim.fixed, and no frozen model; '
        f'there are the anchors {sorted(phase.anchors)}'
      )
    missing = sorted(one.objective.requires - given)
    if missing:
      raise ValueError(
        f'{path}.learned.{name}: its objective reads {missing}, which is not in the batches of the phase'
        f'{suggest(missing[0], given)}'
      )
    if phase.collect.rows % (one.minibatches * phase.micro_batches * phase.rows_per_prompt):
      raise ValueError(
        f'{path}.learned.{name}: {phase.collect.rows} rows do not divide into {one.minibatches} '
        f'minibatches x {phase.micro_batches} micro_batches x groups of {phase.rows_per_prompt}'
      )


# What batches of given completions have without an anchor.
OF_COMPLETIONS = frozenset({'entropy', 'tokens'})


def _check_further(path: str, phase: Phase, run: Experiment) -> None:
  """Refuses further updates without a batch, batches without an update, and sizes that do not divide."""
  made = phase.collect.further_rows
  if phase.further.keys() != made.keys():
    raise ValueError(
      f'{path}.further: the collector makes batches for further updates called {sorted(made)}, but the '
      f'updates are called {sorted(phase.further)}'
    )
  for name, one in phase.further.items():
    if name in {*phase.learned, *phase.networks}:
      raise ValueError(f'{path}.further.{name}: an anchor that learns or a network has this name')
    if missing := sorted(one.objective.requires - OF_COMPLETIONS):
      raise ValueError(
        f'{path}.further.{name}: its objective reads {missing}, but a batch of given completions has '
        f'{sorted(OF_COMPLETIONS)}'
      )
    pieces = one.minibatches * phase.micro_batches * sharding.data_parallel_size(run.mesh)
    if made[name] % pieces:
      raise ValueError(
        f'{path}.further.{name}: {made[name]} rows do not divide into {one.minibatches} minibatches x '
        f'{phase.micro_batches} micro_batches x {sharding.data_parallel_size(run.mesh)} devices '
        f'({_axes_that_cut(run.mesh, "batch")})'
      )


def _check_kernel(path: str, model: Policy, mesh: jax.sharding.Mesh) -> None:
  """Refuses an attention kernel of other devices."""
  kernel, here = model.config.attention, mesh.devices.flat[0].platform
  if PLATFORMS.get(kernel, here) != here:
    usable = sorted(k for k in ATTENTION if PLATFORMS.get(k, here) == here)
    raise ValueError(
      f'{path}.attention: {kernel!r} runs on a {PLATFORMS[kernel]}, the devices here are {here}; '
      f'valid here: {["einsum", *usable]}'
    )


def _check_cut(path: str, model: Policy, mesh: jax.sharding.Mesh, mesh_path: str) -> None:
  """Refuses a mesh that would cut experts, but does not divide them."""
  config = model.config
  experts = sharding.most_shards(mesh, 'experts')
  if getattr(config, 'num_experts', 0) % experts:
    raise ValueError(
      f'{mesh_path}: expert={experts} does not divide the {config.num_experts} experts of {path}'
    )


def _check_pieces(path: str, phase: Phase, mesh: jax.sharding.Mesh) -> None:
  """Refuses rows whose positions do not divide over the mesh: every device would compute all of them."""
  pieces, axes = sharding.most_shards(mesh, 'length'), _axes_that_cut(mesh, 'length')
  length, prompt = phase.collect.length, phase.layout.prompt_length
  parts = {'rows': length}
  if phase.layout.shared > 1:
    parts = {'prompts': prompt, 'completions': length - prompt}
  for name, size in parts.items():
    if size % pieces:
      raise ValueError(
        f'{path}.collect: {name} of {size} tokens do not divide over {axes}; take a '
        f'multiple of {pieces}'
      )


def _axes_that_cut(mesh: jax.sharding.Mesh, axis: str) -> str:
  """The mesh axes that cut a logical axis, named by their configuration fields."""
  sizes = {name: mesh.shape[name] for name in sharding.rules_of(mesh)[axis]}
  return (
    ' x '.join(f'config.mesh.{n}={size}' for n, size in sizes.items() if size > 1) or 'config.mesh'
  )


def _check_length(path: str, length: int, policy: Policy) -> None:
  if length > policy.config.max_length:
    raise ValueError(
      f'{path}: rows of {length} tokens, but config.model.max_length is {policy.config.max_length}'
    )


def check_texts(run: Experiment) -> None:
  """Refuses settings with texts that the tokenizer cannot write, such as a label or a hint.

  Raises:
    ValueError: names the setting.
  """
  readers = {f'config.phases.{name}.collect': one.collect for name, one in run.phases.items()}
  if run.evaluation.every:
    readers['config.evaluation'] = run.evaluation
  for path, reader in readers.items():
    try:
      reader.check_texts(run.tokenizer)
    except ValueError as error:
      raise ValueError(f'{path}.{error}') from error


def check_data(run: Experiment) -> list[str]:
  """Lays out records of every source as the run will: of files all, of generators some, evenly spaced.

  It also traces credit and objective of every phase. `polgrad.check` looks at more, and takes longer.

  Returns:
    What looks wrong, one text each: how many records the run will drop or cut because they are too long
    or unusable, held-out prompts that are trained on, right answers that verifiers do not prefer to an
    empty text.

  Raises:
    ValueError: a record that does not fit: too long, no answer, characters without a token, ...; the
      message names the section of the configuration and the record. Or all of them are dropped, or
      verifiers fail on all, or a service gives no log-probs. Or knobs of credit or objective contradict
      each other.
  """
  check_texts(run)
  told, asked = [], {}
  sections = data_sections(run)
  for one in sections:  # their processes start while losses are traced
    one.begin()
  run.engine.check_there(run.policy, 'config.engine')
  for name, phase in run.phases.items():
    tracing.trace_objective(f'config.phases.{name}', phase, run.policy)
    tracing.trace_networks(f'config.phases.{name}', phase, run.policy)
    look_outside(name, phase, run.tokenizer)
    with _placing(f'config.phases.{name}.curriculum'):
      phase.curriculum.init(phase.source)  # refuses records that lack what it reads
  for one in sections:
    if one.judged:
      told += _try_verifiers(f'{one.path}.reward', one.judged, one.source, run.tokenizer)
      _try_judge(one, run.tokenizer)
      _try_spans(one, run.tokenizer)
    told += [str(x) for x in try_environment(one, run.tokenizer).findings]
    lines, asked[one.path] = _look(one, run.tokenizer)
    told += lines
  return told + [str(one) for one in leaks(sections, asked)]


def look_outside(name: str, phase: Phase, tokenizer: tokenizers.Tokenizer) -> None:
  """Reads the files that the collector of a phase names, and asks its services about a short row.

  Raises:
    ValueError, OSError: a file or record that is missing or damaged, or a service that gives no
      log-probs; the message names the section of the configuration.
  """
  with _placing(f'config.phases.{name}.collect'):
    phase.collect.read_files(phase.source, tokenizer)
  for teacher, model in phase.elsewhere.items():
    place = f'config.phases.{name}.elsewhere.{teacher}'
    asked = teachers.entries_asked(teacher, model, _read_of_models(phase))
    teachers.ask_first(model, asked, getattr(phase.collect, 'temperature', 1.0), place)


class DataSection(NamedTuple):
  """A part of the configuration that reads records."""

  path: str  # `config.phases.train`, `config.phases.train.held_out.pairs`, `config.evaluation`, ...
  source: sources.Source
  rows: int  # rows of the source that may be read, from the first
  reader: collect.Collector | HeldOut  # lays the records out
  judged: Judged | None  # has the verifiers of completions of these records; None: there are none
  held_out: bool  # whether the records are only measured

  def begin(self) -> None:
    """Starts in the background the processes that are tried on some records."""
    if self.judged:
      self.judged.score.begin(TRIED)
    self.reader.begin(1)  # an environment is tried on one record after the other


def data_sections(run: Experiment) -> list[DataSection]:
  """The sections that read records, in the order of the run."""
  found = []
  for name in run.order:
    phase, path = run.phases[name], f'config.phases.{name}'
    found.append(DataSection(path, phase.source, len(phase.source), phase.collect, phase, False))
    for key, source in phase.held_out.items():
      rows = min(phase.held_out_records, len(source))
      found.append(DataSection(f'{path}.held_out.{key}', source, rows, phase.collect, None, True))
  plan = run.evaluation
  if plan.every:
    rows = min(plan.problems, len(plan.source))
    found.append(DataSection('config.evaluation', plan.source, rows, plan, plan, True))
  return found


def leaks(
  sections: Sequence[DataSection], asked: Mapping[str, Sequence[tuple[int, bytes]]]
) -> list[Finding]:
  """Held-out prompts that are also trained on.

  Args:
    asked: (row, digest of the prompt) of records that were read, by the path of their section.
  """
  found = []
  for measured in (one for one in sections if one.held_out):
    for trained in (one for one in sections if not one.held_out):
      own = asked[measured.path]
      both = duplicates.shared(asked[trained.path], own)
      places = measured.source.place, trained.source.place
      found += duplicates.leaks(measured.path, both, len(own), trained.path, places)
  return found


def _try_verifiers(
  path: str, judged: Judged, source: sources.Source, tokenizer: tokenizers.Tokenizer
) -> list[str]:
  """Lets the verifiers judge the answers of a few records; records without one get an empty text.

  Returns:
    A warning if no right answer gets more than an empty text.
  """
  if not judged.reward or not len(source):
    return []
  records = [source[i] for i in sources.spaced(len(source), TRIED)]
  completions = [str(record.get('answer', '')) for record in records]
  scores = judged.judge(completions, records, tokenizer)
  for name, values in scores.components.items():
    if np.isnan(values).all():
      said = [m.partition(f': {name}: ')[2] for m in scores.messages if f': {name}: ' in m]
      reason = said[0] if said else 'as others do'
      term = judged.reward[name]
      whole = scoring.is_batched(getattr(term, 'fn', term))  # a judge or a reward model
      raise ValueError(
        f'{path}.{name}: it fails on all of {len(records)} records, where it judges their own answers '
        f'({reason})' + ('' if whole else HINT)
      )
  if not all(completions):
    return []
  blank = judged.judge([''] * len(records), records, tokenizer).total
  if (scores.total > blank).any() or np.isnan(scores.total - blank).all():
    return []
  return [
    f'{path}: the right answers of {len(records)} records get no more than an empty text; '
    'python -m polgrad.check tries them in the forms that verifiers usually want'
  ]


def _try_judge(section: DataSection, tokenizer: tokenizers.Tokenizer) -> None:
  """Asks a comparison of whole batches, such as a judge on the network, about a few records.

  Raises:
    ValueError: it fails on all of them, as it does without its server or its key.
  """
  phase, source = section.judged, section.source
  if section.held_out or not section.reader.compares:
    return
  if not scoring.is_batched(phase.comparison) or not len(source):
    return
  records = [source[i] for i in sources.spaced(len(source), TRIED)]
  pair = {'first': 'yes', 'second': 'no', 'first_reward': 0.0, 'second_reward': 0.0}
  prompts = lambda: [batching.prompt_text(record, tokenizer) for record in records]
  found = phase.compare([{**pair, 'record': record} for record in records], {'prompt': prompts})
  if np.isnan(found.wins).all():
    reason = found.messages[0].partition(': comparison: ')[2] if found.messages else ''
    raise ValueError(
      f'{section.path}.comparison: it fails on all of {len(records)} records ({reason})'
    )


def _try_spans(section: DataSection, tokenizer: tokenizers.Tokenizer) -> None:
  """Lets the function that scores parts of completions read the answers of a few records.

  Raises:
    ValueError: it fails on all of them.
  """
  phase, source = section.judged, section.source
  if section.held_out or 'span_ids' not in section.reader.provides or not len(source):
    return
  records = [source[i] for i in sources.spaced(len(source), TRIED)]
  texts = [str(record.get('answer', '')) for record in records]
  tokens = [tokenizer.encode(text) for text in texts]
  others = {
    'prompt': lambda: [batching.prompt_text(record, tokenizer) for record in records],
    'tokens': lambda: tokens,
  }
  rewards = [0.0] * len(records)
  found = phase.mark(texts, records, [len(ids) + 1 for ids in tokens], rewards, others)
  if all(parts is None for parts in found.parts):
    reason = found.messages[0].partition(': spans: ')[2] if found.messages else ''
    raise ValueError(f'{section.path}.spans: it fails on all of {len(records)} records ({reason})')


class Tried(NamedTuple):
  """What the environment of a section answered to an empty turn."""

  answers: list[answers.Answer]  # [] without an environment
  findings: list[Finding]


def try_environment(section: DataSection, tokenizer: tokenizers.Tokenizer) -> Tried:
  """Lets the environment of a section answer an empty turn on a few records.

  Raises:
    ValueError: it fails on all of them, or the chat template cannot write what it says.
    RuntimeError: its processes cannot start.
  """
  reader, source = section.reader, section.source
  if not isinstance(reader, collect.Turns) or not reader.has_environment or not len(source):
    return Tried([], [])
  records = [{**source[i], 'id': i} for i in sources.spaced(len(source), TRIED)]
  path = f'{reader_field(section.path)}.environment'
  with _placing(path):
    found = answers.answers(reader, records, tokenizer)
  wrong = answers.findings(path, found, source.place)
  if any(one.fails for one in wrong):
    raise ValueError(str(wrong[0]))
  return Tried(found, wrong)


def _first_reason(section: DataSection, tokenizer: tokenizers.Tokenizer) -> str:
  """Why the first record of a section cannot be laid out."""
  source, reader = section.source, section.reader
  try:
    reader.lay_out([{**source[0], 'id': 0}], tokenizer=tokenizer, cut=reader.overlong == 'truncate')
  except (batching.TooLong, batching.Unusable) as error:
    return f'; for example {source.place(0)}: {str(error).removeprefix("record 0: ")}'
  return ''


def _look(
  section: DataSection, tokenizer: tokenizers.Tokenizer
) -> tuple[list[str], list[tuple[int, bytes]]]:
  """Lays out some of the records of a section.

  Returns:
    How many do not fit, if any; and the row and the digest of the prompt of each.
  """
  path, source, rows, reader, *_ = section
  where = source_field(path)
  count = CHECKED_OF_FILES if source.irregular else CHECKED
  fates, asked = collections.Counter(), []
  for i in sources.spaced(rows, count):
    record = {**source[i], 'id': i}
    try:
      fates[batching.fate(reader, record, tokenizer)] += 1
      asked.append((i, duplicates.asked(record)))
    except ValueError as error:
      said = f'{where}: {source.place(i)}: {str(error).removeprefix(f"record {i}: ")}'
      if isinstance(error, batching.TooLong):
        said += '; give more room, or set overlong to drop or truncate such records'
      if isinstance(error, batching.Unusable):
        said += '; correct such records, or set unusable to drop to leave them out'
      raise ValueError(said) from error
  if fates and fates['dropped'] + fates['unusable'] == fates.total():
    what = 'too long or unusable' if fates['unusable'] else 'too long'
    said = f'{where}: each of {fates.total()} records is {what}, and dropped'
    raise ValueError(said + _first_reason(section, tokenizer))
  told, looked = [], f'{where}: of {fates.total()} records that were looked at'
  if fates['dropped'] + fates['cut']:
    told.append(f'{looked}, {fates["dropped"]} are too long and dropped, {fates["cut"]} are cut')
  if fates['unusable']:
    told.append(f'{looked}, {fates["unusable"]} are unusable and dropped')
  return told, asked
