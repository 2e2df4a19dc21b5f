"""Rollouts: completions that the policy, or a policy near it, samples for the prompts of a step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from polgrad.collect import (
  beginnings,
  old_runs,
  partial,
  parts,
  picks,
  rollout_checks,
  sampled_first,
)
from polgrad.collect import replay as replays
from polgrad.collect.base import Collect, Context, Filtering, reads_teacher
from polgrad.collect.overlapped import overlapped
from polgrad.collect.rollout_steps import PAIR, TRACE, Measured, RolloutSteps, traces_of
from polgrad.collect.row_sampler import make_row_sampler
from polgrad.collect.scored import demonstrated
from polgrad.collect.steps import PROVIDED, common
from polgrad.data import batching
from polgrad.data.sources import Source
from polgrad.data.tokenizers import Tokenizer
from polgrad.losses import divergences, logit_stats
from polgrad.registry import AtLeastOne, Count, Fraction, Range, either, inputs, unbound
from polgrad.sampling import behavior_policies, processors, resumable
from polgrad.types import Batch, Prompts

# Settings that bring rows into a batch besides fresh completions of its prompts.
OTHER_ROWS = ('lag', 'replay', 'old_runs', 'beginning', 'hints', 'demonstrations', 'preferences')
OTHER_ROWS += ('opponents', 'others', 'environment', 'in_flight')

StatPart = Annotated[Callable, either(logit_stats.TABLE, divergences.TABLE)]


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
  # Partial rollouts (arXiv:2501.12599, arXiv:2505.24298): prompts that are sampled at a time, more than
  # a batch has. A batch is made as soon as all rows of `prompts` of them are over; the other rows
  # continue later, with the newest weights. The arrays `versions` and `token_staleness` say which
  # weights drew a token. 0 turns it off: all rows of a batch are sampled by the same weights. With
  # `overlap`, `lag` is then the number of batches that may wait to be used.
  in_flight: Count = 0
  # Batches that a prompt in flight may be left out of; the one after them contains it, however long its
  # rows are.
  batches_in_flight: Count = 1
  # Tokens of a row after which sampling can be interrupted; only with `overlap` and `in_flight`. The
  # sampler then does not finish a batch before the next update begins. 0: it does, and all numbers are
  # determined by the configuration.
  chunk: Count = 0
  # Whether rows in flight are read anew when the weights change, so that all keys and values are those
  # of the weights that draw. False keeps the caches and reads only the last token of each row again:
  # it saves a forward pass, and `behavior_logp` is what was really sampled from. Only with a `chunk`:
  # caches are no part of a checkpoint.
  refill: bool = True
  # Steps between two copies of the weights to the sampler; more than 1 only with a `chunk`.
  weights_every: AtLeastOne = 1
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
  # The first step of a phase samples until it has kept the rows of this number of batches, those that
  # are valid and chosen, and every step trains on them in shuffled epochs, single rows without their
  # groups (RFT, arXiv:2308.01825). It ends before that when every record was drawn once, or after
  # `sample_first_most` batches. 0: every step samples its own batch.
  sample_first: Count = 0
  sample_first_most: Count = 0
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
  # names, for credit and objective. A divergence, or another one that reads `teacher_logits`, needs an
  # anchor `teacher`.
  stats: Mapping[str, StatPart] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    super().__post_init__()
    rollout_checks.check(self)

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
    return not (self.hints or self.others or self.sample_first)

  @property
  def grouped(self) -> bool:
    return not self.sample_first

  def refuse(self, why: str, *names: str) -> None:
    """Refuses settings that this collector cannot have.

    Args:
      why: what they contradict.
      names: of the settings.

    Raises:
      ValueError: some of them are set; names these.
    """
    samples, found = self.samples_per_prompt, self.asked(*names)
    if found:
      shown = [f'{name}={samples}' if name == 'samples_per_prompt' else name for name in found]
      raise ValueError(
        f'{type(self).__name__}: {why}, so {shown} cannot be set; Rollouts has these settings'
      )

  def asked(self, *names: str) -> list[str]:
    """Those of these settings that are set, sorted."""
    given = {
      'beginning': self.begins,
      'choose': unbound(self.choose) is not picks.everything,
      'environment': self.has_environment,
      'samples_per_prompt': self.samples_per_prompt != 1,
      'speculate': self.proposer is not None,
      'token_temperature': unbound(self.token_temperature) is not processors.unchanged,
    }
    return sorted(name for name in names if given.get(name, getattr(self, name)))

  @functools.cached_property
  def rows_per_prompt(self) -> int:
    return picks.rows_of(self.choose, len(self.group))

  @property
  def provides(self) -> frozenset[str]:
    made = {'replay_weight'} if self.corrects_replay else set()
    made |= {'token_staleness'} if self.in_flight else set()
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
    of_tokens |= {'versions': np.int32} if self.in_flight else {}
    return shapes | {name: [dtype, self.length] for name, dtype in of_tokens.items()}

  @property
  def anchors_read(self) -> frozenset[str]:
    models = behavior_policies.models_read
    baseline = models(self.baseline_policy) if self.baseline_samples else ()
    opponent = models(self.opponent_policy) if self.opponents else ()
    measured = ('teacher',) if reads_teacher(self.stats) else ()
    read = {*models(self.behavior_policy), *baseline, *opponent, *measured}
    return super().anchors_read | frozenset(read - {'policy'})

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

  def read_files(self, source: Source, tokenizer: Tokenizer) -> None:
    del source, tokenizer
    self.old  # noqa: B018

  @property
  def remembers_numbers(self) -> bool:
    return self.in_flight > 0

  def init(
    self,
  ) -> Measured | partial.InFlight | sampled_first.Kept | replays.Ring | replays.Best | tuple:
    """An empty memory: of batches, of rows in flight, and of entropies if the sampler reads them."""
    if self.sample_first:
      return sampled_first.empty(self._blank(), self.sample_first)
    memory = self._empty()
    if self.in_flight:
      sizes = self.in_flight, self.samples_per_prompt, self.prompt_length, self.max_new_tokens
      return partial.InFlight(resumable.empty(*sizes), memory)
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
        for trace in traces_of(record, self.traces):
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
    context = self.within(context)
    fields = self._parts(context)
    if self.in_flight:
      flying = partial.make_in_flight_steps(self, context, fields)
      return partial.asynchronous(flying) if self.overlap else flying.collect
    return self.collected_by(RolloutSteps(**fields))

  def collected_by(self, steps: RolloutSteps) -> Collect:
    """What makes the batch of a step with these steps: when they sample, and what is trained on."""
    if self.sample_first:
      return sampled_first.sampled_first(steps)
    return overlapped(steps) if self.overlap else steps.collect

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
