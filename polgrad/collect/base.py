"""The interface of collectors, and the parts that all of them share."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import numpy as np

from polgrad import credit as credits
from polgrad import curricula, exchanges, sharding, speed, teachers
from polgrad.collect.drawn import Draws, Episode, Turns, make_draws
from polgrad.compiling import Program, jit
from polgrad.data import batching
from polgrad.data.sources import Source
from polgrad.data.tokenizers import Tokenizer
from polgrad.learner import NetworkLearner, forward_in_pieces, parameter_sets, read_by_anchors
from polgrad.losses.implicit_rewards import last_value
from polgrad.models.policy import Policy
from polgrad.objectives import Objective
from polgrad.packing import pack
from polgrad.registry import AtLeastOne, Count, Positive, Range, inputs
from polgrad.rewards.scoring import Compared, Marked, Scores
from polgrad.sampling import engines, speculation
from polgrad.types import PLAIN, Array, Batch, Layout, Outputs, Params, Prompts, TrainState

Draw = Callable[[int], list[dict]]  # number -> that many data records, the next of the source
Score = Callable[[Sequence[str], Sequence[dict], Sequence[int]], Scores]  # texts, records, lengths
Compare = Callable[..., Compared]  # pairs of completions -> probabilities, see `make_comparer`
# Texts, records, lengths, rewards -> scores of parts of the texts, see `make_marker`.
Mark = Callable[..., Marked]
HEAD_SCORE = '_head_score'  # ending of the score of an anchor's scalar head
COMPARED = frozenset({'wins', 'baseline_wins'})  # features that comparisons of completions fill in


class Context(NamedTuple):
  """What a phase gives to its collector."""

  policy: Policy
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  seed: int
  objective: Objective
  credit: credits.Estimator
  score: Score
  frozen: Mapping[str, Policy]  # models of the anchors that are not copies of the policy
  micro_batches: int
  layout: Layout = PLAIN
  compare: Compare | None = None  # None: nothing is compared
  opened: Callable[[Sequence[dict]], list[dict]] = list  # records -> those of the prompts
  curriculum: curricula.Curriculum = curricula.epochs()
  mark: Mark | None = None  # None: parts of completions are not scored
  sampler_mesh: jax.sharding.Mesh | None = None  # None: rows are sampled on `mesh`
  networks: Mapping[str, NetworkLearner] = {}  # that score hidden states, by name
  source: Sequence[dict] = ()  # records by row, for collectors that return to a row later
  minibatches: int = 1  # updates in a pass over the batch of a step
  # Models that are not on the devices of the run, by name.
  elsewhere: Mapping[str, teachers.Elsewhere] = {}
  engine: engines.Own | engines.External = engines.OWN  # what draws completions of one turn


class Collected(NamedTuple):
  """The data of one step, and what to report of it."""

  batch: Batch  # NumPy
  credit_state: Any
  collect_state: Any
  metrics: dict[str, float]
  samples: list[tuple[str, str, float]]  # prompt, completion, reward
  messages: list[str]  # of verifiers and environments that failed
  terms: Mapping[str, np.ndarray] = {}  # f[B], terms of the rewards of the rows that were sampled
  episodes: Sequence[Episode] = ()  # [B], of the rows that were sampled; () without an environment
  sampled: curricula.Sampled | None = None  # every row that was scored; None: the data have them
  further: Mapping[str, Batch] = {}  # NumPy, of further updates that are due, see `Phase.further`
  # Waits for rows that are still being sampled, and gives what is above but for the batch.
  pending: Callable[['Collected'], 'Collected'] | None = None

  def finished(self) -> 'Collected':
    """All of it, after the updates on the batch: waits for the rows that are sampled beside them."""
    return self if self.pending is None else self.pending(self)


Collect = Callable[[TrainState, Draw, int], Collected]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collector(abc.ABC):
  """How a phase gets its batches: the interface of all collectors.

  A collector is a frozen dataclass whose fields are its settings. It holds no state: what it remembers
  is `TrainState.collect_state`, and what it compiles belongs to the function that `make` returns.
  """

  # Of records with more tokens than fit: 'error' refuses them, 'drop' takes the next one instead, and
  # 'truncate' cuts prompts at their beginning and rows with completions at their end.
  overlong: batching.Overlong = 'error'
  # Whether the collector rewards rows itself, so that no verifier is needed.
  judges: ClassVar[bool] = False

  @abc.abstractmethod
  def make(self, context: Context) -> Collect:
    """Makes collect(state, draw, step) -> Collected, the function that makes the batch of a step.

    `step` is the number of batches that the phase has collected before.
    """

  def begin(self, rows: int) -> None:  # noqa: B027
    """Starts processes that make the rows of a batch in the background; most collectors have none."""

  def lay_out(
    self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False
  ) -> Batch | Prompts:
    """The arrays of these records (each with an `id`) before anything is sampled.

    Raises:
      TooLong: a record that does not fit the lengths, even if it is cut where `cut` allows that.
      ValueError: a record lacks a field.
    """
    return batching.prompts(records, tokenizer, length=self.prompt_length, cut=cut)

  def check_texts(self, tokenizer: Tokenizer) -> None:
    """Refuses settings with texts that the tokenizer cannot write, or that have too many tokens.

    Raises:
      ValueError: names the setting.
    """
    del tokenizer

  @classmethod
  def longest_row(cls, length: int, asked: Mapping[str, Any]) -> int:
    """Tokens of a row, where a prompt with its completion has at most `length`.

    Args:
      length: in tokens.
      asked: settings of the collector, those that are not the default ones.
    """
    del asked
    return length

  @classmethod
  def longest_prompt(
    cls, length: int, new: int, chat: bool, asked: Mapping[str, Any], *, sampled: bool = False
  ) -> int:
    """Tokens of a prompt with what the collector puts beside it, where that of a record has `length`.

    Args:
      length: in tokens.
      new: largest number of tokens of a completion.
      chat: whether prompts are conversations.
      asked: settings of the collector, those that are not the default ones.
      sampled: count what is only sampled and not trained too.
    """
    del new, chat, asked, sampled
    return length

  @classmethod
  def asks_behind(cls, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of evaluations: the `label` that prompts are behind, and its `label_length`; {}: none.

    Args:
      asked: settings of the collector, those that are not the default ones.
    """
    del asked
    return {}

  @property
  def fields(self) -> tuple[str, ...]:
    """Fields of the records that hold completions to train on; () if all are sampled."""
    return ()

  @property
  def cut(self) -> bool:
    """Whether records with more tokens than fit are cut, see `overlong`."""
    return self.overlong == 'truncate'

  @property
  @abc.abstractmethod
  def records(self) -> int:
    """Data records that a step draws, without those of dynamic sampling."""

  @property
  @abc.abstractmethod
  def rows_per_prompt(self) -> int:
    """Consecutive rows of the batch that belong to one record."""

  @property
  def one_prompt(self) -> bool:
    """Whether the rows of a record have the same prompt, so that it may be forwarded once."""
    return True

  @property
  def grouped(self) -> bool:
    """Whether the rows of a record are consecutive, so that they may be compared."""
    return True

  @property
  def rows(self) -> int:
    """Rows of the batch."""
    return self.records * self.rows_per_prompt

  @property
  @abc.abstractmethod
  def length(self) -> int:
    """Positions of a row."""

  @property
  def prompt_length(self) -> int:
    """Leading positions that hold only prompt or padding in every row; 0: no such guarantee."""
    return 0

  @property
  def lays_apart(self) -> bool:
    """Whether what `lay_out` makes of a record depends on no other one.

    Each of several processes then lays out its share of the records; otherwise each lays out all.
    """
    return True

  @property
  def temperature(self) -> float:
    """Temperature of sampling, and therefore of all log-probs."""
    return 1.0

  @property
  def provides(self) -> frozenset[str]:
    """Fields and features of the batch that are there without credit or anchors."""
    return frozenset()

  @property
  def compares(self) -> bool:
    """Whether completions of a prompt are compared, by the phase's `comparison`."""
    return bool(COMPARED & self.provides)

  @property
  def further_rows(self) -> Mapping[str, int]:
    """Rows of the batches for further updates that some steps have, by name, see `Phase.further`."""
    return {}

  @property
  def anchors_read(self) -> frozenset[str]:
    """Anchors that the sampler reads besides the policy."""
    return frozenset()

  @property
  def terms_ignored(self) -> frozenset[str]:
    """Terms of the reward that dynamic sampling does not compare."""
    return frozenset()

  @property
  def terms_read(self) -> frozenset[str]:
    """Terms of the reward that are features of the batch."""
    return frozenset()

  @property
  def earned(self) -> frozenset[str]:
    """Terms of the reward that no verifier gives: that of an environment."""
    return frozenset()

  @property
  def filtered(self) -> bool:
    """Whether sampling differs from the policy (top-k, top-p, greedy, mixtures).

    The log-probs of the sampler are then not those of the policy.
    """
    return False

  @property
  def overlaps(self) -> bool:
    """Whether rows are sampled while the policy is updated."""
    return False

  @property
  def samples_apart(self) -> bool:
    """Whether rows can be sampled on devices that do not train."""
    return False

  def read_files(self, source: Source, tokenizer: Tokenizer) -> None:  # noqa: B027
    """Reads files that the settings name, so that what is wrong with them is found before a run.

    Args:
      source: records of the phase.
      tokenizer: of the run.

    Raises:
      ValueError, FileNotFoundError: says what is wrong.
    """

  @property
  def remembers_numbers(self) -> bool:
    """Whether its memory (`init`) has numbers of records, by which later steps read them again."""
    return False

  def init(self) -> Any:
    """The first `TrainState.collect_state`."""
    return ()


def laid_out(lay: Callable[[Sequence[dict]], Any], records: Sequence[dict]) -> Any:
  """`lay(records)`, of which each process lays out its share of the records; all get all rows.

  Args:
    lay: records -> `Batch` or `Prompts`, with rows that depend on their record alone. Groups are
      numbered from 0 by their record.
    records: of a step, each with an `id`.
  """

  def numbered(part: Sequence[tuple[int, dict]]) -> Any:
    made = lay([record for _, record in part])
    if getattr(made, 'group_ids', None) is None:
      return made
    return made.replace(group_ids=made.group_ids + np.int32(part[0][0]))

  found = exchanges.rows(numbered, list(enumerate(records)), 'records of a step')
  return found.replace(records=tuple(records)) if isinstance(found, Prompts) else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotator:
  """Fills in what the live parameters compute for the rows of a batch; see `make_annotator`."""

  context: Context
  own: frozenset[str]  # out of {'proximal_logp', 'old_values'}
  stats: frozenset[str]  # statistics of the policy
  # (params, batch, params of the teacher or None) -> outputs; None: nothing of the policy is needed
  of_policy: Callable[[Params, Batch, Params | None], Outputs] | None
  reads_teacher: bool  # whether a statistic of the policy reads the teacher's logits
  of_anchor: Mapping[str, Callable[[Params, Batch], Outputs]]  # by name of the anchor
  # By name of the anchor, the score f32[B] of its scalar head after the last token of each row.
  of_head: Mapping[str, Callable[[Params, Batch], Array]] = dataclasses.field(default_factory=dict)
  # By name of a model that is not on the devices of the run: batch (NumPy) -> arrays of it
  of_elsewhere: Mapping[str, Callable[[Batch], dict[str, np.ndarray]]] = dataclasses.field(
    default_factory=dict
  )
  mismatched: bool = False  # whether `mismatched_log_ratio` is read
  random: bool = False  # whether `uniform` is read
  # By name of the network: (parameters of the model, of the network, batch) -> scores [B, T]
  of_network: Mapping[str, Callable[[Params, Params, Batch], Array]] = dataclasses.field(
    default_factory=dict
  )

  def __call__(self, state: TrainState, batch: Batch) -> Batch:
    """The batch (NumPy) with the fields and features that are read."""
    batch = self._scored_mismatches(state, batch)
    if self.random and 'uniform' not in batch:
      step = int(sharding.to_host(state.phase_step))
      numbers = np.random.default_rng((self.context.seed, step, 1))
      batch = batch.with_arrays(uniform=numbers.random(len(batch.tokens), np.float32))
    first = {'teacher'} & self.of_elsewhere.keys() if self.stats else set()
    for name in first:  # statistics may compare the policy with it
      batch = batch.with_arrays(**self._asked(name, batch))
    rows = self.placed(batch)
    found = {}
    params = parameter_sets(state, self.context.frozen)
    if self.own or self.stats:
      outputs = self.of_policy(
        state.params, rows, params['teacher'] if self.reads_teacher else None
      )
      named = {'proximal_logp': outputs.logp, 'old_values': outputs.values}
      found |= {name: named[name] for name in self.own} | outputs.stats
    bare = read_by_anchors(batch)
    plain = rows if bare is batch else self.placed(bare)
    for name, function in self.of_anchor.items():
      found[f'{name}_logp'] = function(params[name], plain).logp
    for name, function in self.of_network.items():
      one = self.context.networks[name]
      own = state.networks[name]['params']
      found[f'{name}_scores'] = function(params[one.states_of], own, self._read(one, batch))
    for name, function in self.of_head.items():
      found[f'{name}{HEAD_SCORE}'] = function(params[name], plain)
    # The devices are at work meanwhile.
    for name in self.of_elsewhere.keys() - first:
      found |= self._asked(name, batch)
    return batch.with_arrays(**sharding.to_host(found))

  def _asked(self, name: str, batch: Batch) -> dict[str, np.ndarray]:
    """What a model elsewhere says of a batch; the first process alone asks, and tells the others."""
    asked = lambda: self.of_elsewhere[name](read_by_anchors(batch))
    return exchanges.first(asked, f'log-probs of {name}')

  def _scored_mismatches(self, state: TrainState, batch: Batch) -> Batch:
    """The batch with `mismatched_log_ratio` in the place of the rows that it is computed of."""
    given = {n: x for n, x in batch.features.items() if n.startswith('mismatched_')}
    if not given:
      return batch
    batch = batch.replace(features={n: x for n, x in batch.features.items() if n not in given})
    if not self.mismatched:
      return batch
    rows = Batch(**{n.removeprefix('mismatched_'): x for n, x in given.items()})
    placed, params = self.placed(rows), parameter_sets(state, self.context.frozen)
    teacher = params['teacher'] if self.reads_teacher else None
    outputs = (
      self.of_policy(state.params, placed, teacher),
      self.of_anchor['reference'](params['reference'], placed),
    )
    own, other = sharding.to_host([one.logp for one in outputs])
    gap = np.where(rows.mask, own - other, 0.0).sum(axis=1)
    return batch.with_arrays(
      mismatched_log_ratio=np.where(rows.mask.any(axis=1), gap, np.nan).astype(np.float32)
    )

  def flops(self, batch: Batch) -> float:
    """Operations of the forward passes over the rows of a batch (NumPy), see `speed`."""
    policy, frozen = self.context.policy, self.context.frozen
    models = [policy] if self.own or self.stats else []
    models += [frozen.get(name, policy) for name in self.of_anchor]
    models += [policy] * len(self.of_head)
    if self.mismatched:
      models += [policy, frozen.get('reference', policy)]
    models += [frozen.get('teacher', policy)] if self.reads_teacher else []
    models += [self.context.networks[name].policy for name in self.of_network]
    layout = self.context.layout
    flops = lambda model: speed.forward_flops(
      model.config, batch, layout, layers=model.hidden is not None
    )
    return sum(map(flops, models))

  def _read(self, one: NetworkLearner, batch: Batch) -> Batch:
    """What a network reads of the batch, on the devices."""
    named = {name: batch[name] for name in one.network.requires}
    rows = Batch(tokens=batch.tokens, segment_ids=batch.segment_ids, mask=batch.mask)
    return sharding.place_batch(self.context.mesh, rows.with_arrays(**named))

  def placed(self, batch: Batch) -> Batch:
    """What the forward pass reads of the batch, on the devices."""
    context = self.context
    rows = Batch(
      tokens=batch.tokens,
      segment_ids=batch.segment_ids,
      mask=batch.mask,
      layout=context.layout,
    )
    # A teacher whose logits a statistic reads does not see the tokens of `policy_only`.
    names = ('policy_only', 'teacher_states', 'teacher_top_ids', 'teacher_top_log_probs')
    rows = rows.with_arrays(**{name: batch[name] for name in names if name in batch})
    devices = sharding.data_parallel_size(context.mesh)
    rows = pack(rows, parts=context.micro_batches, data_parallel_size=devices)
    return sharding.place_batch(context.mesh, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Turns, Collector):
  """A collector that samples: which rows, how long, and what completions begin and end with."""

  # Data records of a step.
  prompts: AtLeastOne = 8
  # Rows that are sampled for each prompt.
  samples_per_prompt: AtLeastOne = 8
  # Tokens that prompts are left-padded to; see `overlong`.
  prompt_length: AtLeastOne = 64
  # Largest number of tokens behind the prompt. Stop tokens count, and so do replies of an environment.
  max_new_tokens: AtLeastOne = 64
  # Divides all logits, in sampling and in every later forward pass.
  temperature: Positive = 1.0
  # Overlong filtering (arXiv:2503.14476): rows without a stop token count in the statistics of their
  # group and leave the loss. Whether they also leave its denominator is decided by the aggregation:
  # `constant_length` counts all rows, the others what is in the mask.
  mask_truncated: bool = False
  # The beginning of every completion, such as '<think>': it is given, not sampled and not trained, and
  # verifiers see it.
  prefix: str = ''
  # Texts that end a completion, besides the stop tokens.
  stop_strings: tuple = ()

  def __post_init__(self):
    self.check_turns(type(self).__name__)

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    return super().lay_out(self.opened(records), tokenizer=self.own(tokenizer), cut=cut)

  def own(self, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with this prefix and these stop strings."""
    return tokenizer.sampling(self.prefix, self.stop_strings)

  def within(self, context: Context) -> Context:
    """The context with the tokenizer that `own` gives, and with the environment."""
    return context._replace(tokenizer=self.own(context.tokenizer), opened=self.opened)

  @property
  def records(self) -> int:
    return self.prompts

  @property
  def rows_per_prompt(self) -> int:
    return self.samples_per_prompt

  @property
  def length(self) -> int:
    return self.prompt_length + self.max_new_tokens

  @property
  def proposer(self) -> speculation.Proposer | None:
    """What proposes tokens to the sampler; None: nothing does."""
    return None

  @property
  def drafts(self) -> tuple[str, ...]:
    """The parameter sets that proposals are made with, besides those of the behavior policy."""
    return self.proposer.reads if self.proposer else ()

  @property
  def earned(self) -> frozenset[str]:
    return frozenset({'environment'} if self.has_environment else ())

  @property
  def turn_arrays(self) -> dict[str, type]:
    """Dtypes of the arrays [B, T] that only batches of an environment have."""
    numbers = dict.fromkeys(('turn_rewards', 'void_turns'), np.float32)
    ids = dict.fromkeys(('observation_ids', 'turn_players'), np.int32)
    return numbers | ids if self.has_environment else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filtering(Sampling):
  """A collector that samples and can leave out unlikely tokens.

  The sampler's log-probs are then not those of the policy, unless `recompute_proximal` is set.
  """

  # Number of most likely tokens that sampling keeps; 0 keeps all.
  top_k: Count = 0
  # Probability mass of the most likely tokens that sampling keeps; 1 keeps all.
  top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
  # Rows that are decoded at a time (see `make_sampler`); 0 decodes all at once.
  slots: Count = 0
  # What proposes tokens, several of which the policy then checks in one pass: speculative decoding
  # (docs/sampling.md). No completion depends on it.
  speculate: speculation.Part = speculation.Off
  # Compute `proximal_logp` by a forward pass of the trainer; False takes the sampler's log-probs.
  recompute_proximal: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.proposer and self.has_environment:
      raise ValueError(
        f'{type(self).__name__}: speculate proposes tokens of completions of one turn; leave out the '
        'environment, or take speculation.Off'
      )

  @property
  def proposer(self) -> speculation.Proposer | None:
    return self.speculate if isinstance(self.speculate, speculation.Proposer) else None

  @property
  def anchors_read(self) -> frozenset[str]:
    return super().anchors_read | {*self.drafts} - {'policy'}

  @property
  def filtered(self) -> bool:
    return (self.top_k > 0 or self.top_p < 1) and not self.recompute_proximal


# Settings that a collector hands to its sampler, under the same names, if it has them.
HANDED_ON = ('max_new_tokens', 'temperature', 'top_k', 'top_p', 'slots')


def draws_of(settings: Sampling, context: Context, **sampler: Any) -> Draws:
  """The sampler of a collector, with the tokenizer, the models and the devices of the run.

  Args:
    sampler: settings of `make_sampler` besides those in `HANDED_ON`.
  """
  own = {field.name for field in dataclasses.fields(settings)}
  return make_draws(
    settings,
    context.frozen,
    tokenizer=context.tokenizer,
    policy=context.policy,
    mesh=context.sampler_mesh or context.mesh,
    engine=context.engine,
    **{name: getattr(settings, name) for name in HANDED_ON if name in own},
    **({'speculate': settings.proposer} if settings.proposer else {}),
    **sampler,
  )


def make_annotator(
  context: Context,
  temperature: float,
  *,
  recompute_proximal: bool = False,
  stats: Mapping[str, Callable] = {},
  provided: frozenset[str] = frozenset(),
) -> Annotator:
  """Finds out what objective and credit read, and compiles the forward passes that compute it.

  Args:
    temperature: divides all logits, as it did when the rows were sampled.
    recompute_proximal: compute `proximal_logp` with the live policy, if it is read.
    stats: statistics of the live policy's next-token distribution; features under these names. They
      may compare it with that of the anchor `teacher`.
    provided: log-probs of anchors that the collector has from elsewhere.

  Returns:
    (state, batch) -> batch with the `stats`, `old_values`, `proximal_logp` and `<anchor>_logp` of any
    anchor, `mismatched_log_ratio`, `uniform` and the `<network>_scores` of any network.
  """
  wanted = context.objective.requires | context.credit.requires
  wanted = wanted.union(*(one.network.requires for one in context.networks.values()))
  mismatched = 'mismatched_log_ratio' in wanted
  wanted |= {'reference_logp'} if mismatched else set()
  common = dict(temperature=temperature, micro_batches=context.micro_batches)
  make = lambda policy, **outputs: Program(
    jit(functools.partial(forward_in_pieces, policy, **common, **outputs))
  )
  # Of the policy: old values and, if it is recomputed, the proximal log-probs.
  own = wanted & ({'old_values', 'proximal_logp'} if recompute_proximal else {'old_values'})
  values = frozenset({'values'} if 'old_values' in own else ())
  teacher = context.frozen.get('teacher', context.policy)

  def of_policy(params: Params, batch: Batch, teacher_params: Params | None) -> Outputs:
    other = None if teacher_params is None else (teacher, teacher_params)
    settings = dict(fields=values, stats=stats, teacher=other)
    return forward_in_pieces(context.policy, params, batch, **common, **settings)

  # Of anchors: all log-probs that come neither from the policy nor from a statistic.
  given = {'behavior_logp', 'proximal_logp', *stats, *context.objective.stats, *provided}
  names = [n.removesuffix('_logp') for n in sorted(wanted - given) if n.endswith('_logp')]
  anchors = [name for name in names if name not in context.elsewhere]
  scored = [n.removesuffix(HEAD_SCORE) for n in sorted(wanted) if n.endswith(HEAD_SCORE)]

  def last_score(params: Params, batch: Batch) -> Array:
    fields = frozenset({'values_after'})
    outputs = forward_in_pieces(context.policy, params, batch, **common, fields=fields)
    return last_value(outputs.values_after, batch.mask)

  asked = {
    name: teachers.entries_asked(name, model, wanted.union(*map(inputs, stats.values())))
    for name, model in context.elsewhere.items()
  }
  elsewhere = {
    name: functools.partial(
      teachers.arrays_of, context.elsewhere[name], name, asked=one, temperature=temperature
    )
    for name, one in asked.items()
    if one
  }
  return Annotator(
    context=context,
    own=own,
    stats=frozenset(stats),
    of_policy=Program(jit(of_policy)) if own or stats or mismatched else None,
    reads_teacher=reads_teacher(stats),
    of_elsewhere=elsewhere,
    of_head={name: Program(jit(last_score)) for name in scored},
    of_anchor={n: make(context.frozen.get(n, context.policy), fields=frozenset()) for n in anchors},
    mismatched=mismatched,
    random='uniform' in wanted,
    of_network={name: Program(jit(one.scores)) for name, one in context.networks.items()},
  )


def reads_teacher(stats: Mapping[str, Callable]) -> bool:
  """Whether one of these statistics reads the logits of the anchor `teacher`."""
  return any('teacher_logits' in inputs(stat) for stat in stats.values())


def minibatches(
  batch: Batch, *, epochs: int, parts: int, rows_per_prompt: int, seed: Sequence[int]
) -> list[Batch]:
  """`epochs` passes over the batch, each cut at random into `parts`; groups stay whole.

  With one part the rows keep their order.
  """
  groups = np.arange(len(batch.tokens)).reshape(-1, rows_per_prompt)
  random = np.random.default_rng(seed)
  cuts = []
  for _ in range(epochs):
    order = random.permutation(len(groups)) if parts > 1 else np.arange(len(groups))
    cuts += [groups[np.sort(piece)].reshape(-1) for piece in np.split(order, parts)]
  return [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in cuts]
