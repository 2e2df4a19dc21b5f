"""Rollouts: completions that the policy, or a policy near it, samples for the prompts of a step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from polgrad.collect import beginnings, old_runs, parts, picks
from polgrad.collect import replay as replays
from polgrad.collect.base import (
  COMPARED,
  Collect,
  Context,
  Draw,
  Filtering,
  Sampling,
  draws_of,
  reads_teacher,
)
from polgrad.collect.drawn import Drawn, Draws, with_rewards
from polgrad.collect.overlapped import overlapped
from polgrad.collect.scored import (
  Texts,
  begun,
  compare_groups,
  compare_with,
  completions,
  demonstrated,
  distinct,
  informative,
  joined,
  joined_rows,
  pooled,
  replace_groups,
  replacements,
  score_rows,
)
from polgrad.collect.steps import PROVIDED, Report, Steps, common, sampled_of
from polgrad.curricula import Sampled
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.learner import parameter_sets
from polgrad.losses import logit_stats, selections
from polgrad.objectives.base import RESERVED
from polgrad.registry import Count, Fraction, Range, inputs, unbound
from polgrad.sampling import behavior_policies, processors
from polgrad.sharding import copied, to_host
from polgrad.types import STREAMS, Batch, Prompts, TrainState

PAIR = ('chosen', 'rejected')  # fields of a record with a preference
TRACE = 'trace'  # field of the completion that was drawn of several
# Settings that bring rows into a batch besides fresh completions of its prompts.
OTHER_ROWS = ('lag', 'replay', 'old_runs', 'beginning', 'hints', 'demonstrations', 'preferences')
OTHER_ROWS += ('opponents', 'others', 'environment')


class Measured(NamedTuple):
  """What a collector remembers whose sampler reads the entropies of the batch before."""

  memory: Any  # of `lag` and `replay`
  entropy_levels: np.ndarray  # f32[3], see `selections.entropy_levels`; 0 before the first batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(Filtering):
  """Samples completions of prompts, scores and credits them."""

  # Who samples: the policy itself, greedy, an anchor, or a mixture with one.
  behavior_policy: behavior_policies.Part = behavior_policies.current
  # Temperature of each token, times `temperature`: `processors.entropy_scaled` samples uncertain tokens
  # at a higher one. It needs the statistic `old_entropy`, whose levels it gets from the batch before.
  # `behavior_logp` is under this distribution, the log-probs of the trainer are not.
  token_temperature: processors.Part = processors.unchanged
  # Fraction of the tokens of a batch whose entropy counts as low for `token_temperature`.
  low_entropy: Fraction = 0.8
  # Dynamic sampling (arXiv:2503.14476): how often, at most, further prompts are drawn to replace
  # groups whose rewards are all equal.
  max_resamples: Count = 0
  # Names of terms of the reward that dynamic sampling does not compare, such as a penalty of length:
  # then groups of equal correctness are replaced, whatever their lengths.
  resample_ignores: tuple = ()
  # Asynchronous training (arXiv:2505.24298): collected batches between sampling a batch and training
  # on it. The first `lag` steps of a phase reuse its first batch. What depends on the live policy
  # (values, credit, ...) is computed when a batch is used.
  lag: Count = 0
  # Sample a batch while the policy is updated on the one of `lag` steps before. All numbers are those of
  # the same lag without it; what it costs is a copy of the parameters that the sampler reads.
  overlap: bool = False
  # Number of batches, older than that one, that are kept for replay; 0 replays nothing.
  replay: Count = 0
  # Fraction of the groups of a batch that are replaced by groups of the kept ones, drawn anew each
  # step (arXiv:2503.18929, arXiv:2507.06892).
  replay_fraction: Fraction = 0.0
  # How much a remembered group is worth: groups are drawn with probabilities proportional to
  # priority^replay_exponent. `contrast` takes those whose rewards differ most. An infinite exponent
  # takes those with the largest priorities, newest first.
  replay_priority: replays.Part = replays.uniform
  replay_exponent: Annotated[float, Range(at_least=0)] = 1.0
  # Importance weights of groups that are used again, (n P)^-b (arXiv:1511.05952): b in the first step,
  # and the steps in which it rises linearly to 1 (0: it does not rise). If either is not 0, every row
  # has the feature `replay_weight`, which `weights.replayed` multiplies its loss with, and groups are
  # drawn independently, so that one may come twice.
  replay_correction: Fraction = 0.0
  replay_correction_steps: Count = 0
  # Whether these weights are divided by the largest one, of the groups that may be drawn.
  replay_correction_scaled: bool = True
  # Which groups of a batch are replaced: random ones, or (at most this fraction) the 'dull' ones, whose
  # rewards are all equal.
  replay_into: Literal['random', 'dull'] = 'random'
  # Which groups are remembered: those of the newest batches, or the 'best' ones by their priority, as
  # many as `replay` batches have.
  replay_keep: Literal['newest', 'best'] = 'newest'
  # Replay across experiments (arXiv:2311.15951): folders WORKDIR/rollouts of earlier runs with the same
  # lengths and groups, whose rows are trained on again. Their log-probs are those of the policies that
  # sampled them.
  old_runs: tuple = ()
  # Fraction of the groups of a batch that are replaced by random groups of these runs.
  old_fraction: Fraction = 0.0
  # Who samples the baseline: greedy, once, is ReMax (arXiv:2310.10505); the reference, eight times,
  # is A*-PO (arXiv:2505.20686).
  baseline_policy: behavior_policies.Part = behavior_policies.greedy
  # Further completions of each prompt that are not trained on; their rewards are `baseline_rewards`
  # [B, n]. A prompt whose verifier fails on one of them is not trained on either.
  baseline_samples: Count = 0
  # Which pairwise comparisons are made, by the phase's `comparison`, as the features that they fill in:
  # 'wins' of the rows of a group against each other, 'baseline_wins' against the baseline.
  compare: tuple = ()
  # Score parts of each completion by the phase's `spans`: the features `span_ids` and `span_scores`.
  spans: bool = False
  # Rows of each group, behind the samples, that another policy samples and that may be trained on as
  # well. The feature `opponent` is 1 for them.
  opponents: Count = 0
  # Who samples them: the reference is XPO (arXiv:2405.21046).
  opponent_policy: behavior_policies.Part = behavior_policies.reference
  # Which rows of each group are trained on, such as the best and the worst.
  choose: picks.Part = picks.everything
  # Terms of the reward, by their names in the phase's `reward`, that credit and objective may read: what
  # the verifier of term `kind` says of a row is the feature `kind_term`, before it is weighed. A term of
  # weight 0 is not rewarded but only noted.
  terms: tuple = ()
  # The reward of a sampled row without a stop token; inf leaves what the verifiers say.
  unfinished_reward: float = math.inf
  # How many tokens of the record's `answer` each completion begins with, such as a random number
  # (arXiv:2404.08495). They are given, verifiers see them, and the completion is not trained on them.
  # `prompt_length` must have room for them.
  beginning: beginnings.Part = beginnings.nothing
  # 1 adds a row to each group whose mask has the tokens that its completions begin with, to imitate
  # them (arXiv:2505.16984). It is a demonstration in `Batch.stream` with the reward of the whole answer.
  hints: int = 0
  # 1 adds rows with the record's `chosen` and `rejected` to each group, the last two rows, with their
  # `label`; they are demonstrations in `Batch.stream`.
  preferences: int = 0
  # 1 adds a row with the record's `answer` to each group (arXiv:2504.14945), scored by the same
  # verifiers. Its `behavior_logp` is 0, and so is its `proximal_logp` unless that is recomputed.
  # `Batch.stream` tells these rows from the sampled ones.
  demonstrations: int = 0
  # Rows of each group with the answers of other prompts, behind the samples: the first ones of the
  # record's `demonstrations`, see `sources.with_demonstrations`. They are demonstrations in
  # `Batch.stream`. No verifier reads them, so their reward is 0.
  others: Count = 0
  # Name of a field of the records with several completions, such as those of different teachers: the
  # demonstration of a step is one of them, drawn uniformly. '' takes `answer`, which verifiers read.
  traces: str = ''
  # Statistics of the policy's next-token distribution when the batch is used: features under their
  # names, for credit and objective. One that reads `teacher_logits` needs an anchor `teacher`.
  stats: Mapping[str, logit_stats.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    super().__post_init__()
    _check_environment(self)
    _check_counts(self)
    _check_memory(self)
    _check_stats(self.stats)

  @classmethod
  def longest_prompt(
    cls, length: int, new: int, chat: bool, asked: Mapping[str, Any], *, sampled: bool = False
  ) -> int:
    del chat, sampled
    return length + new if asked.get('beginning') else length

  @property
  def fields(self) -> tuple[str, ...]:
    answers = ('answer',) if self.begins or (self.demonstrations and not self.traces) else ()
    return (*answers, *PAIR) if self.preferences else answers

  @property
  def group(self) -> tuple[str, ...]:
    """What each row of a group is, before some of them are chosen."""
    sampled = ('sampled',) * self.samples_per_prompt + ('opponent',) * self.opponents
    sampled += ('other',) * self.others
    given = ('answer',) * self.demonstrations + ('hint',) * self.hints
    return sampled + given + PAIR * self.preferences

  @property
  def begins(self) -> bool:
    """Whether completions may begin with tokens of the record's answer."""
    return unbound(self.beginning) is not beginnings.nothing

  @property
  def one_prompt(self) -> bool:
    # The row of a hint has none of it in its prompt.
    return not (self.hints or self.others)

  def refuse(self, why: str, *names: str) -> None:
    """Refuses settings that this collector cannot have.

    Args:
      why: what they contradict.
      names: of the settings.

    Raises:
      ValueError: some of them are set; names these.
    """
    samples = self.samples_per_prompt
    given = {
      'beginning': self.begins,
      'choose': unbound(self.choose) is not picks.everything,
      'environment': self.has_environment,
      'samples_per_prompt': samples != 1,
    }
    found = sorted(name for name in names if given.get(name, getattr(self, name)))
    if found:
      shown = [f'{name}={samples}' if name == 'samples_per_prompt' else name for name in found]
      raise ValueError(
        f'{type(self).__name__}: {why}, so {shown} cannot be set; Rollouts has these settings'
      )

  @functools.cached_property
  def rows_per_prompt(self) -> int:
    return picks.rows_of(self.choose, len(self.group))

  @property
  def provides(self) -> frozenset[str]:
    made = {'replay_weight'} if self.corrects_replay else set()
    return PROVIDED | self.stats.keys() | self._shapes().keys() | made

  @property
  def corrects_replay(self) -> bool:
    """Whether rows have the feature `replay_weight`."""
    return bool(self.replay_correction or self.replay_correction_steps)

  def _shapes(self) -> dict[str, tuple]:
    """Arrays that some settings add: dtype and shape of a row."""
    # By name: whether the array is there, its dtype, and the axes of a row.
    some = {
      'baseline_rewards': (self.baseline_samples, np.float32, self.baseline_samples),
      'stream': (
        self.demonstrations or self.hints or self.preferences or self.others,
        np.int32,
      ),
      'label': (self.preferences, np.float32),
      'opponent': (self.opponents, np.float32),
      'wins': ('wins' in self.compare, np.float32, self.rows_per_prompt),
      'baseline_wins': ('baseline_wins' in self.compare, np.float32, self.baseline_samples),
    }
    shapes = {name: shape for name, (there, *shape) in some.items() if there}
    shapes |= {f'{name}_term': [np.float32] for name in self.terms}
    of_tokens = self.turn_arrays | (parts.ARRAYS if self.spans else {})
    return shapes | {name: [dtype, self.length] for name, dtype in of_tokens.items()}

  @property
  def anchors_read(self) -> frozenset[str]:
    baseline = inputs(self.baseline_policy) if self.baseline_samples else ()
    opponent = inputs(self.opponent_policy) if self.opponents else ()
    measured = ('teacher',) if reads_teacher(self.stats) else ()
    read = {*inputs(self.behavior_policy), *baseline, *opponent, *measured}
    return frozenset(read - {'policy'})

  @property
  def overlaps(self) -> bool:
    return self.overlap

  @property
  def samples_apart(self) -> bool:
    return type(self) is Rollouts

  @property
  def terms_ignored(self) -> frozenset[str]:
    return frozenset(self.resample_ignores if self.max_resamples else ())

  @property
  def terms_read(self) -> frozenset[str]:
    return frozenset(self.terms)

  @property
  def filtered(self) -> bool:
    mixed = unbound(self.behavior_policy) is not behavior_policies.current
    mixed = mixed or unbound(self.token_temperature) is not processors.unchanged
    return super().filtered or (mixed and not self.recompute_proximal)

  @property
  def measures_entropy(self) -> bool:
    """Whether the sampler reads the entropies of the batch before."""
    return 'entropy_levels' in inputs(self.token_temperature)

  @functools.cached_property
  def old(self) -> Batch | None:
    """The rows of earlier runs; None without any."""
    sizes = dict(rows_per_prompt=self.rows_per_prompt, prompt_length=self.prompt_length)
    return old_runs.load(self.old_runs, self._blank(), **sizes) if self.old_runs else None

  def read_files(self) -> None:
    self.old  # noqa: B018

  def init(self) -> Measured | replays.Ring | replays.Best | tuple:
    """An empty memory: of `lag` and `replay`, and of entropies if the sampler reads them."""
    memory = self._empty()
    return Measured(memory, np.zeros(3, np.float32)) if self.measures_entropy else memory

  def _empty(self) -> replays.Ring | replays.Best | tuple:
    """An empty memory for the batches that `lag` and `replay` need; () without them."""
    if not (self.lag or self.replay):
      return ()
    if self.replay_keep == 'best':
      size = dict(batches=self.replay, rows_per_prompt=self.rows_per_prompt)
      return replays.empty_best(self._blank(), **size)
    return replays.empty(self._blank(), capacity=self.lag + self.replay + 1)

  def _blank(self) -> Batch:
    """A batch of zeros with the arrays, shapes and dtypes that are remembered."""
    tokens = lambda dtype: np.zeros((self.rows, self.length), dtype)
    rows = lambda dtype, *shape: np.zeros((self.rows, *shape), dtype)
    return Batch(
      tokens=tokens(np.int32),
      segment_ids=tokens(np.int32),
      mask=tokens(bool),
      behavior_logp=tokens(np.float32),
      finished=rows(bool),
      prompt_ids=rows(np.int32),
      group_ids=rows(np.int32),
      sampled_at=rows(np.int32),
      rewards=rows(np.float32),
      valid=rows(bool),
    ).with_arrays(**{name: rows(*shape) for name, shape in self._shapes().items()})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    prompts = super().lay_out(records, tokenizer=tokenizer, cut=cut)
    own = self.own(tokenizer)
    if self.begins:
      for record in records:
        batching.completion(record, own)  # refuses a record without an answer
      return prompts
    # Completions of the data are added after sampling; here one that does not fit is refused.
    for field in self.fields:
      self.demonstrated(records, own, field, cut=cut)
    self.others_of(records, own, cut=cut)
    if self.traces:
      for record in records:
        for trace in _traces(record, self.traces):
          self.demonstrated([{**record, TRACE: trace}], own, TRACE, cut=cut)
    return prompts

  def demonstrated(
    self, records: Sequence[dict], tokenizer: Tokenizer, field: str, *, cut: bool
  ) -> Batch:
    """The records' completions in a field as if they had been sampled, see `scored.demonstrated`."""
    sizes = dict(prompt_length=self.prompt_length, max_new_tokens=self.max_new_tokens)
    return demonstrated(records, tokenizer, **sizes, cut=cut, field=field)

  def others_of(self, records: Sequence[dict], tokenizer: Tokenizer, *, cut: bool) -> Batch | None:
    """The rows of other prompts beside these records, `others` of each; None without them.

    Raises:
      ValueError: a record with fewer of them; the message names it.
    """
    if not self.others:
      return None
    for record in records:
      found = record.get('demonstrations', ())
      if len(found) < self.others:
        raise ValueError(
          f'record {record["id"]}: others={self.others} needs as many records in `demonstrations`, got '
          f'{len(found)}; the source with_demonstrations adds them, with count={self.others}'
        )
    # The ids are those of the prompts that they are beside: their own may be of another source.
    flat = [{**x, 'id': r['id']} for r in records for x in r['demonstrations'][: self.others]]
    rows = self.demonstrated(flat, tokenizer, 'answer', cut=cut)
    return rows.replace(group_ids=rows.group_ids // self.others)

  def make(self, context: Context) -> Collect:
    made = RolloutSteps(**self._parts(self.within(context)))
    return overlapped(made) if self.overlap else made.collect

  def _parts(self, context: Context) -> dict[str, Any]:
    """The fields of `RolloutSteps`."""
    draw_rows = make_row_sampler(
      self, context, self.samples_per_prompt, self.behavior_policy, self.token_temperature
    )
    # A seed that no phase has: others must not draw the noise of what they are compared with.
    other = context._replace(seed=~context.seed)
    draw_baselines = draw_opponents = None
    if self.baseline_samples:
      draw_baselines = make_row_sampler(self, other, self.baseline_samples, self.baseline_policy)
    if self.opponents:
      draw_opponents = make_row_sampler(self, other, self.opponents, self.opponent_policy)
    return dict(
      settings=self,
      old=self.old,
      draw_rows=draw_rows,
      draw_baselines=draw_baselines,
      draw_opponents=draw_opponents,
      **common(self, context, recompute_proximal=self.recompute_proximal, stats=self.stats),
    )


def _traces(record: Mapping[str, Any], field: str) -> Sequence[Any]:
  """The completions in a field of a record.

  Raises:
    ValueError: there are none; the message names the record and the field.
  """
  found = record.get(field)
  if isinstance(found, str) or not isinstance(found, Sequence) or not found:
    raise ValueError(
      f'record {record["id"]}: traces={field!r} must be a list of completions, got {found!r}; there is '
      f'{sorted(record)}'
    )
  return found


def _check_counts(settings: Rollouts) -> None:
  greedy = unbound(settings.baseline_policy) is behavior_policies.greedy
  if not greedy and not settings.baseline_samples:
    raise ValueError('Rollouts: baseline_policy draws nothing, because baseline_samples is 0')
  if settings.demonstrations not in (0, 1) or settings.preferences not in (0, 1):
    raise ValueError(
      f'Rollouts: demonstrations must be 0 or 1, got {settings.demonstrations}: a record has one '
      f'answer; and so must preferences, got {settings.preferences}: it has one pair'
    )
  unknown = {*settings.compare} - COMPARED
  if unknown or ('baseline_wins' in settings.compare and not settings.baseline_samples):
    raise ValueError(
      f"Rollouts: compare={settings.compare}: valid are 'wins' and, with baseline_samples, "
      "'baseline_wins'"
    )
  if settings.measures_entropy and 'old_entropy' not in settings.stats:
    raise ValueError(
      'Rollouts: token_temperature reads the entropies of the batch before, so stats must have '
      f'old_entropy (logit_stats.entropy), got {sorted(settings.stats)}'
    )
  if 'wins' in inputs(settings.choose) and 'wins' not in settings.compare:
    raise ValueError("Rollouts: choose reads wins, so 'wins' must be in compare")
  if settings.spans and (settings.begins or settings.has_environment):
    raise ValueError(
      'Rollouts: spans are parts of a completion that the policy wrote whole, in one turn; leave out '
      f'{"the beginning" if settings.begins else "the environment"}'
    )
  if settings.begins and (settings.demonstrations or settings.preferences or settings.others):
    raise ValueError('Rollouts: with a beginning, groups have no demonstrations and no preferences')
  if settings.traces and not settings.demonstrations:
    raise ValueError(f'Rollouts: traces={settings.traces!r} is not read without demonstrations=1')
  if settings.hints not in (0, 1) or (settings.hints and not settings.begins):
    raise ValueError(
      f'Rollouts: hints must be 0, or 1 with a beginning, got hints={settings.hints}; beginnings are '
      f'{sorted(beginnings.TABLE)}'
    )
  settings.rows_per_prompt  # refuses a choice of more rows than there are  # noqa: B018


def _check_environment(settings: Rollouts) -> None:
  """Refuses groups of episodes with rows that nothing answers."""
  if not settings.has_environment:
    return
  asked = {
    'demonstrations': settings.demonstrations,
    'preferences': settings.preferences,
    'others': settings.others,
    'beginning': settings.begins,
  }
  for knob, value in asked.items():
    if value:
      raise ValueError(
        f'Rollouts: {knob}={value} adds completions of the data to groups, which '
        'have no turns of an environment; leave it out, or the environment'
      )


def _check_memory(settings: Rollouts) -> None:
  """Refuses settings of `replay`, old runs and `overlap` that contradict each other."""
  fraction, replay = settings.replay_fraction, settings.replay
  if not 0 <= fraction <= 1 or bool(fraction) != bool(replay):
    raise ValueError(
      'Rollouts: replay_fraction must be 0 without replay, and in (0, 1] with it; '
      f'got replay={replay}, replay_fraction={fraction}'
    )
  if bool(settings.old_runs) != bool(settings.old_fraction):
    raise ValueError(
      'Rollouts: old_fraction must be 0 without old_runs, and in (0, 1] with them; '
      f'got old_runs={settings.old_runs}, old_fraction={settings.old_fraction}'
    )
  if settings.replay_keep == 'best' and (settings.lag or not settings.replay):
    raise ValueError(
      'Rollouts: replay_keep=best needs a number of batches in replay, and no lag, got '
      f'replay={replay}, lag={settings.lag}'
    )
  if settings.replay_keep == 'best' and 'rewards' not in inputs(settings.replay_priority):
    raise ValueError(
      'Rollouts: replay_keep=best needs a replay_priority that reads rewards, such as '
      'replay.contrast; by others all groups of a new batch are equally good'
    )
  if settings.corrects_replay and (not settings.replay or settings.old_runs):
    raise ValueError(
      'Rollouts: replay_correction weighs what is drawn from replay, so it needs replay, and no '
      f'old_runs; got replay={replay}, old_runs={settings.old_runs}'
    )
  if settings.corrects_replay and math.isinf(settings.replay_exponent):
    raise ValueError(
      'Rollouts: with replay_exponent=inf nothing is drawn, so there is no replay_correction'
    )
  if settings.overlap and not (settings.lag and settings.samples_apart):
    raise ValueError(
      f'{type(settings).__name__}: overlap samples beside an update on an earlier batch, so it needs '
      f'lag of at least 1, and Rollouts; got lag={settings.lag}'
    )
  if settings.overlap and settings.measures_entropy:
    raise ValueError(
      'Rollouts: token_temperature reads the entropies of the batch before, which overlap trains on '
      'at the same time; leave out one of them'
    )


def _check_stats(stats: Mapping[str, Callable]) -> None:
  for name in stats:
    if name in RESERVED:
      raise ValueError(f'Rollouts: stats.{name}: the name is taken; taken are {sorted(RESERVED)}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampler:
  """Samples completions of records with one behavior policy."""

  context: Context
  lay_out: Callable[[Sequence[dict]], Prompts]
  samples_per_prompt: int
  reads: tuple[str, ...]  # parameter sets of the behavior policy
  draw: Draws
  measures: bool = False  # whether the sampler reads entropies of the batch before

  def __call__(
    self, state: TrainState, records: Sequence[dict], step: int, before: Sequence[int] = ()
  ) -> Drawn:
    """Completions of the records, or episodes that begin with them.

    Args:
      before: ids of records whose completions the step has drawn already: noise is not drawn again.
    """
    context = self.context
    prompts = self.lay_out(records)
    params = parameter_sets(state, context.frozen)
    rows = self.draw(
      {name: params[name] for name in self.reads} | levels_of(state, self.measures),
      prompts,
      records,
      distinct(prompts.ids, before),
      seed=context.seed,
      step=step,
    )
    # The sampler got ids that differ where a prompt is there twice.
    ids = np.repeat(prompts.ids, self.samples_per_prompt)
    return rows._replace(batch=rows.batch.replace(prompt_ids=ids))


def make_row_sampler(
  settings: Sampling,
  context: Context,
  samples_per_prompt: int,
  behavior_policy: Callable = behavior_policies.current,
  token_temperature: Callable = processors.unchanged,
) -> RowSampler:
  """The `RowSampler` of a collector whose records are prompts.

  Args:
    context: of `Sampling.within`.
    samples_per_prompt: rows of each record.
    behavior_policy: who samples.
    token_temperature: of each token, see `processors.TABLE`.
  """
  tokenizer, cut = context.tokenizer, settings.cut
  measures = 'entropy_levels' in inputs(token_temperature)
  return RowSampler(
    context=context,
    # Prompts alone: `Rollouts.lay_out` would lay out the demonstrations too.
    lay_out=functools.partial(Sampling.lay_out, settings, tokenizer=tokenizer, cut=cut),
    samples_per_prompt=samples_per_prompt,
    reads=inputs(behavior_policy),
    draw=draws_of(
      settings,
      context,
      samples_per_prompt=samples_per_prompt,
      behavior_policy=behavior_policy,
      **({'token_temperature': token_temperature} if measures else {}),
    ),
    measures=measures,
  )


def levels_of(state: TrainState, measures: bool) -> dict[str, np.ndarray]:
  """What the sampler reads of the batch before, beside its parameter sets."""
  return {'entropy_levels': to_host(state.collect_state.entropy_levels)} if measures else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSteps(Steps):
  """The steps of `Rollouts`."""

  settings: Rollouts
  draw_rows: RowSampler
  draw_baselines: RowSampler | None  # None: there are no baselines
  draw_opponents: RowSampler | None  # None: there are no opponents
  old: Batch | None = None  # rows of earlier runs; None: there are none

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    records = self._begin(draw(self.settings.prompts), step)
    return self._draw(self.draw_rows, state, records, step), records

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    """Scores the rows, replaces uninformative groups, adds further rows to each, and chooses rows."""
    batch, texts = self._judge(rows, records)
    batch, texts, sampled = self._resample(batch, texts, state, draw, step)
    records = texts.records
    report = Report.of(batch, texts)._replace(sampled=sampled)
    if self.settings.max_resamples:
      report.metrics['rollouts'] = float(len(sampled.rows))
    if self.draw_opponents is not None:
      batch, report = self._add_opponents(batch, records, report, state, step)
    if self.settings.others:
      batch, report = self._add_others(batch, records, report)
    for kind in self.settings.group:
      if kind not in ('sampled', 'opponent', 'other'):
        batch, report = self._add_given(kind, batch, records, report, step)
    batch = self._with_kinds(batch)
    others = None
    if self.draw_baselines is not None:
      batch, others, report = self._add_baselines(batch, records, report, state, step)
    batch, report = self._compare(batch, others, records, report)
    if self.settings.spans:
      batch, errors, messages = parts.mark_rows(batch, records, self.context)
      report = report.with_errors(errors, messages)
      report.metrics.update(parts.metrics(batch))
    batch, report = self._choose(batch, report, step, records)
    if self.context.curriculum.pools:
      batch = batch.replace(group_ids=pooled(batch.prompt_ids))
    return batch, report

  def _begin(self, records: Sequence[dict], step: int) -> Sequence[dict]:
    """The records, some of which begin their completion with that of the data."""
    settings = self.settings
    if not settings.begins:
      return records
    random = np.random.default_rng((self.context.seed, step, 3, records[0]['id']))
    given = lambda length: settings.beginning(length, random, step)
    return [
      begun(record, self.context.tokenizer, given, settings.max_new_tokens) for record in records
    ]

  def _judge(self, rows: Drawn, records: Sequence[dict]) -> tuple[Batch, Texts]:
    """Sampled rows with their rewards; a row without a stop token gets `unfinished_reward`, if set."""
    batch, texts = self._scored(rows, records)
    other = self.settings.unfinished_reward
    if math.isfinite(other):
      rewards = np.where(batch.finished | ~batch.valid, batch.rewards, np.float32(other))
      batch = with_rewards(batch, rewards)
    return batch, texts

  def _scored(self, rows: Drawn, records: Sequence[dict]) -> tuple[Batch, Texts]:
    """Rows with their rewards, and with those terms of them that are read."""
    batch, texts = score_rows(rows, records, self.context)
    found = {
      f'{name}_term': np.where(batch.valid, texts.scores.components[name], 0).astype(np.float32)
      for name in self.settings.terms
    }
    return batch.with_arrays(**found), texts

  def choice(self, step: int) -> replays.Choice:
    """Which groups of the batch of a step are replaced by remembered ones."""
    settings = self.settings
    start, steps = settings.replay_correction, settings.replay_correction_steps
    done = min(step / steps, 1.0) if steps else 0.0
    return replays.Choice(
      settings.replay_fraction,
      settings.replay_priority,
      settings.replay_exponent,
      settings.replay_into,
      start + (1 - start) * done if settings.corrects_replay else None,
      settings.replay_correction_scaled,
    )

  def lent(self, state: TrainState) -> TrainState:
    """The state with copies of the parameters that the sampler reads, where it needs its own."""
    settings, mesh = self.settings, self.context.sampler_mesh
    if mesh is None and not settings.overlap:
      return state
    read = {name: state.anchors[name] for name in settings.anchors_read}
    with self.meter.timing('transfer'):
      params, anchors = copied(mesh or self.context.mesh, (state.params, read))
      jax.block_until_ready((params, anchors))
    return state.replace(params=params, anchors=anchors, opt_state=(), learned={})

  def exchange(self, batch: Batch, memory: Any, random: np.random.Generator) -> tuple[Batch, Any]:
    """Stores the batch, takes out the one to train on (`lag`, `replay`), and mixes old rows into it."""
    if isinstance(memory, Measured):
      batch, own = self._exchanged(batch, memory.memory, random)
      memory = memory._replace(memory=own)
    else:
      batch, memory = self._exchanged(batch, memory, random)
    return self.mixed(batch, random), memory

  def mixed(self, batch: Batch, random: np.random.Generator) -> Batch:
    """The batch with the rows of earlier runs that belong into it."""
    settings = self.settings
    if self.old is None:
      return batch
    return old_runs.mixed(
      batch,
      self.old,
      fraction=settings.old_fraction,
      rows_per_prompt=settings.rows_per_prompt,
      random=random,
    )

  def _exchanged(self, batch: Batch, memory: Any, random: np.random.Generator) -> tuple[Batch, Any]:
    """`_remembered`, if there is a memory of batches."""
    return self._remembered(batch, memory, random) if memory else (batch, memory)

  def measured(self, batch: Batch, memory: Any) -> Any:
    if not isinstance(memory, Measured):
      return memory
    share = self.settings.low_entropy
    levels = selections.entropy_levels(batch['old_entropy'], batch.mask, share=share)
    return memory._replace(entropy_levels=to_host(levels))

  def _remembered(
    self, batch: Batch, memory: Any, random: np.random.Generator
  ) -> tuple[Batch, Any]:
    """The batch to train on, which older ones may be part of, and the memory with the new one."""
    step = int(batch.sampled_at[0])
    if isinstance(memory, replays.Best):
      choice = self.choice(step)
      memory = replays.stored_best(memory, batch, choice)
      return replays.recalled_best(memory, batch, choice=choice, random=random), memory
    memory = self.stored(batch, memory)
    return self.recalled(memory, random, step), memory

  def stored(self, batch: Batch, memory: replays.Ring) -> replays.Ring:
    """The ring with one more batch."""
    return replays.stored(memory, batch)

  def recalled(
    self, memory: replays.Ring, random: np.random.Generator, step: int, coming: int = 0
  ) -> Batch:
    """The batch of a ring to train on in a step, see `replay.recalled`."""
    settings = self.settings
    return replays.recalled(
      memory,
      lag=settings.lag,
      choice=self.choice(step),
      rows_per_prompt=settings.rows_per_prompt,
      random=random,
      coming=coming,
    )

  def _draw(self, sampler: RowSampler, *arguments: Any) -> Drawn:
    """Rows of a sampler, on the clock of the rollout."""
    with self.meter.timing('rollout'):
      return self.count(sampler(*arguments), sampler.samples_per_prompt)

  def _resample(
    self, batch: Batch, texts: Texts, state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Texts, Sampled]:
    """Dynamic sampling: replaces groups with equal rewards by groups of further prompts.

    Returns:
      The rows, their texts, and all rows that were sampled.
    """
    samples, ignored = self.settings.samples_per_prompt, self.settings.resample_ignores
    drawn = [record['id'] for record in texts.records]  # a small data set gives a prompt again
    attempts = [sampled_of(batch, texts)]
    kept = np.arange(len(texts.records))  # which of the groups of all attempts is in each place
    dull = [~informative(batch, texts, samples, ignored)]
    for _ in range(self.settings.max_resamples):
      useful = informative(batch, texts, samples, ignored)
      if useful.all():
        break
      records = self._begin(draw(self.settings.prompts), step)
      rows = self._draw(self.draw_rows, state, records, step, drawn)
      fresh = self._judge(rows, records)
      drawn += [record['id'] for record in records]
      attempts.append(sampled_of(*fresh))
      dull.append(~informative(*fresh, samples, ignored))
      own = np.arange(len(records)) + sum(map(len, dull[:-1]))
      kept = np.concatenate([kept, own])[replacements(useful, ~dull[-1])]
      batch, texts = replace_groups((batch, texts), fresh, useful, samples, ignored)
    replaced = np.concatenate(dull)
    replaced[kept] = False
    sampled = jax.tree.map(lambda *parts: np.concatenate(parts), *attempts)
    return batch, texts, sampled._replace(replaced=np.repeat(replaced, samples))

  def _add_opponents(
    self, batch: Batch, records: Sequence[dict], report: Report, state: TrainState, step: int
  ) -> tuple[Batch, Report]:
    """Adds the rows of the other policy to each group, behind its samples."""
    # As if the prompts had been drawn before, so that a baseline draws other noise.
    ids = [record['id'] for record in records]
    rows, texts = self._judge(self._draw(self.draw_opponents, state, records, step, ids), records)
    terms = joined(report.terms, texts.scores.components, len(records))
    episodes = joined_rows(report.episodes, texts.episodes, len(records))
    report = report._replace(terms=terms, episodes=episodes)
    return joined(batch, rows, len(records)), report.beside('opponent', rows, texts.scores)

  def _add_others(
    self, batch: Batch, records: Sequence[dict], report: Report
  ) -> tuple[Batch, Report]:
    """Adds the answers of other prompts to each group, behind the rows that are there."""
    rows = self.settings.others_of(records, self.context.tokenizer, cut=self.settings.cut)
    nothing = np.zeros(len(rows.tokens), np.float32)
    noted = {f'{name}_term': nothing for name in self.settings.terms}
    rows = rows.replace(rewards=nothing, valid=np.ones(len(nothing), bool)).with_arrays(**noted)
    unknown = {name: np.full_like(nothing, np.nan) for name in report.terms}
    report = report._replace(terms=joined(report.terms, unknown, len(records)))
    return joined(batch, rows, len(records)), report

  def _add_given(
    self, kind: str, batch: Batch, records: Sequence[dict], report: Report, step: int
  ) -> tuple[Batch, Report]:
    """Adds a completion of the record to each group, behind the rows that are there.

    Args:
      kind: 'answer', 'hint' or a field of `PAIR`.
    """
    settings, field = self.settings, 'answer' if kind == 'hint' else kind
    whole = [{k: x for k, x in record.items() if k != 'begun'} for record in records]
    if kind == 'answer' and settings.traces:
      field, random = TRACE, np.random.default_rng((self.context.seed, step, 6))
      traces = [_traces(record, settings.traces) for record in whole]
      whole = [{**r, TRACE: t[random.integers(len(t))]} for r, t in zip(whole, traces)]
    rows = settings.demonstrated(whole, self.context.tokenizer, field, cut=settings.cut)
    rows, texts = self._scored(Drawn(rows), whole)
    if kind == 'hint':
      given = np.array([len(record.get('begun', ())) for record in records])
      place = np.arange(rows.mask.shape[1]) - settings.prompt_length
      rows = rows.replace(mask=rows.mask & (place < given[:, None]))
    terms = joined(report.terms, texts.scores.components, len(records))
    report = report._replace(terms=terms)
    name = 'demonstration' if kind == 'answer' else kind
    return joined(batch, rows, len(records)), report.beside(name, rows, texts.scores)

  def _with_kinds(self, batch: Batch) -> Batch:
    """The batch with what says which row of a group is which, where that is needed."""
    group = self.settings.group
    repeat = lambda row: np.tile(row, len(batch.tokens) // len(group))
    sampled = [kind in ('sampled', 'opponent') for kind in group]
    streams = [STREAMS.index('sampled' if one else 'demonstration') for one in sampled]
    kinds = {
      'stream': np.array(streams, np.int32),
      'label': np.array([kind == 'chosen' for kind in group], np.float32),
      'opponent': np.array([kind == 'opponent' for kind in group], np.float32),
    }
    wanted = self.settings.provides
    return batch.with_arrays(**{name: repeat(x) for name, x in kinds.items() if name in wanted})

  def _add_baselines(
    self, batch: Batch, records: Sequence[dict], report: Report, state: TrainState, step: int
  ) -> tuple[Batch, Batch, Report]:
    """Samples and scores the baseline of each prompt, and gives its rewards to the prompt's rows."""
    others, texts = self._judge(self._draw(self.draw_baselines, state, records, step), records)
    size = len(self.settings.group)
    spread = lambda x: np.repeat(x.reshape(len(records), -1), size, axis=0)
    # Without its whole baseline a prompt has no advantages.
    valid = batch.valid & spread(others.valid).all(axis=1)
    batch = batch.replace(baseline_rewards=spread(others.rewards), valid=valid)
    return batch, others, report.beside('baseline', others, texts.scores)

  def _compare(
    self, batch: Batch, others: Batch | None, records: Sequence[dict], report: Report
  ) -> tuple[Batch, Report]:
    """Fills in the comparisons that the settings name."""
    for name in self.settings.compare:
      if name == 'wins':
        batch, errors, messages = compare_groups(batch, records, self.context)
      else:
        batch, errors, messages = compare_with(batch, others, records, self.context)
      report = report.with_errors(errors, messages)
    return batch, report

  def _choose(
    self, batch: Batch, report: Report, step: int, records: Sequence[dict] = ()
  ) -> tuple[Batch, Report]:
    """The rows of each group that are trained on; those that are not usable are not `valid`."""
    size = len(self.settings.group)
    groups = lambda x: x.reshape(-1, size, *x.shape[1:])
    arrays = {name: groups(batch[name]) for name in ('rewards', 'valid', 'wins') if name in batch}
    arrays['lengths'] = groups(batch.mask.sum(axis=1))
    if 'texts' in inputs(self.settings.choose):
      said = completions(batch, records, self.context.tokenizer, report.episodes)
      arrays['texts'] = groups(np.array(said, object))
    random = np.random.default_rng((self.context.seed, step, 4))
    chosen = picks.choose(self.settings.choose, arrays, random)
    rows = (chosen.rows + size * np.arange(len(chosen.rows))[:, None]).reshape(-1)
    terms = {name: x[rows] for name, x in report.terms.items()}
    report.metrics['left_out'] = float(
      np.sum(~chosen.usable & arrays['valid'].any(axis=1)[:, None])
    )
    picked = jax.tree.map(lambda x: x[rows], batch)
    if 'wins' in picked:
      columns = np.repeat(chosen.rows, chosen.rows.shape[1], axis=0)
      wins = np.take_along_axis(picked['wins'], columns, axis=1)
      picked = picked.with_arrays(wins=wins)
    valid = picked.valid & chosen.usable.reshape(-1)
    episodes = [report.episodes[i] for i in rows] if report.episodes else []
    return picked.replace(valid=valid), report._replace(terms=terms, episodes=episodes)
