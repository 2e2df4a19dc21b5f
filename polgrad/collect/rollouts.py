"""Rollouts: completions that the policy, or a policy near it, samples for the prompts of a step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from polgrad.collect import replay as replays
from polgrad.collect.base import Collect, Context, Draw, Sampling
from polgrad.collect.scored import (
  Texts,
  demonstrated,
  distinct,
  informative,
  replace_groups,
  score_rows,
)
from polgrad.collect.steps import PROVIDED, Report, Steps, common
from polgrad.data.tokenizers import Tokenizer
from polgrad.learner import parameter_sets
from polgrad.losses import logit_stats
from polgrad.objectives.base import RESERVED
from polgrad.registry import AtLeastOne, Count, Fraction, Positive, Range, inputs, unbound
from polgrad.sampling import behavior_policies, stopping
from polgrad.sampling.sampler import make_sampler
from polgrad.sharding import to_host
from polgrad.types import STREAMS, Batch, Prompts, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(Sampling):
  """Samples completions of prompts, scores and credits them."""

  # Data records of a step.
  prompts: AtLeastOne = 8
  # Completions of each prompt.
  samples_per_prompt: AtLeastOne = 8
  # Tokens that prompts are left-padded to; see `overlong`.
  prompt_length: AtLeastOne = 64
  # Largest number of tokens of a completion, stop token included.
  max_new_tokens: AtLeastOne = 64
  # Divides all logits, in sampling and in every later forward pass.
  temperature: Positive = 1.0
  # Number of most likely tokens that sampling keeps; 0 keeps all.
  top_k: Count = 0
  # Probability mass of the most likely tokens that sampling keeps; 1 keeps all.
  top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
  # Completions that are decoded at a time (see `make_sampler`); 0 decodes all at once.
  slots: Count = 0
  # Who samples: the policy itself, greedy, an anchor, or a mixture with one.
  behavior_policy: behavior_policies.Part = behavior_policies.current
  # Compute `proximal_logp` by a forward pass of the trainer; False takes the sampler's log-probs.
  recompute_proximal: bool = False
  # Dynamic sampling (arXiv:2503.14476): how often, at most, further prompts are drawn to replace
  # groups whose rewards are all equal.
  max_resamples: Count = 0
  # Names of terms of the reward that dynamic sampling does not compare, such as a penalty of length:
  # then groups of equal correctness are replaced, whatever their lengths.
  resample_ignores: tuple = ()
  # Overlong filtering (arXiv:2503.14476): rows without a stop token count in the statistics of their
  # group and leave the loss. Whether they also leave its denominator is decided by the aggregation:
  # `constant_length` counts all rows, the others what is in the mask.
  mask_truncated: bool = False
  # Asynchronous training (arXiv:2505.24298): collected batches between sampling a batch and training
  # on it. The first `lag` steps of a phase reuse its first batch. What depends on the live policy
  # (values, credit, ...) is computed when a batch is used.
  lag: Count = 0
  # Number of batches, older than that one, that are kept for replay; 0 replays nothing.
  replay: Count = 0
  # Fraction of the groups of a batch that are replaced by groups of the kept ones, drawn anew each
  # step (arXiv:2503.18929, arXiv:2507.06892).
  replay_fraction: Fraction = 0.0
  # Who samples the baseline: greedy, once, is ReMax (arXiv:2310.10505); the reference, eight times,
  # is A*-PO (arXiv:2505.20686).
  baseline_policy: behavior_policies.Part = behavior_policies.greedy
  # Further completions of each prompt that are not trained on; their rewards are `baseline_rewards`
  # [B, n]. A prompt whose verifier fails on one of them is not trained on either.
  baseline_samples: Count = 0
  # 1 adds a row with the record's `answer` to each group (arXiv:2504.14945), scored by the same
  # verifiers. Its `behavior_logp` is 0, and so is its `proximal_logp` unless that is recomputed.
  # `Batch.stream` tells these rows from the sampled ones.
  demonstrations: int = 0
  # Statistics of the policy's next-token distribution when the batch is used: features under their
  # names, for credit and objective.
  stats: Mapping[str, logit_stats.Part] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    _check_counts(self)
    _check_stats(self.stats)

  @property
  def records(self) -> int:
    return self.prompts

  @property
  def fields(self) -> tuple[str, ...]:
    return ('answer',) if self.demonstrations else ()

  @property
  def rows_per_prompt(self) -> int:
    return self.samples_per_prompt + self.demonstrations

  @property
  def length(self) -> int:
    return self.prompt_length + self.max_new_tokens

  @property
  def provides(self) -> frozenset[str]:
    some = {'baseline_rewards': self.baseline_samples, 'stream': self.demonstrations}
    return PROVIDED | self.stats.keys() | {name for name, there in some.items() if there}

  @property
  def anchors_read(self) -> frozenset[str]:
    baseline = inputs(self.baseline_policy) if self.baseline_samples else ()
    return frozenset({*inputs(self.behavior_policy), *baseline} - {'policy'})

  @property
  def terms_ignored(self) -> frozenset[str]:
    return frozenset(self.resample_ignores if self.max_resamples else ())

  @property
  def filtered(self) -> bool:
    mixed = unbound(self.behavior_policy) is not behavior_policies.current
    return (self.top_k > 0 or self.top_p < 1 or mixed) and not self.recompute_proximal

  def init(self) -> replays.Ring | tuple:
    """An empty memory for the batches that `lag` and `replay` need; () without them."""
    if not (self.lag or self.replay):
      return ()
    return replays.empty(self._blank(), capacity=self.lag + self.replay + 1)

  def _blank(self) -> Batch:
    """A batch of zeros with the arrays, shapes and dtypes that are remembered."""
    tokens = lambda dtype: np.zeros((self.rows, self.length), dtype)
    rows = lambda dtype, *shape: np.zeros((self.rows, *shape), dtype)
    samples = self.baseline_samples
    return Batch(
      tokens=tokens(np.int32),
      segment_ids=tokens(np.int32),
      mask=tokens(bool),
      behavior_logp=tokens(np.float32),
      finished=rows(bool),
      prompt_ids=rows(np.int32),
      group_ids=rows(np.int32),
      stream=rows(np.int32) if self.demonstrations else None,
      sampled_at=rows(np.int32),
      rewards=rows(np.float32),
      valid=rows(bool),
      baseline_rewards=rows(np.float32, samples) if samples else None,
    )

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    prompts = super().lay_out(records, tokenizer=tokenizer, cut=cut)
    if self.demonstrations:  # they are added after sampling; here one that does not fit is refused
      self.demonstrated(records, self.own(tokenizer), cut=cut)
    return prompts

  def demonstrated(self, records: Sequence[dict], tokenizer: Tokenizer, *, cut: bool) -> Batch:
    """The records' answers as if they had been sampled, see `scored.demonstrated`."""
    sizes = dict(prompt_length=self.prompt_length, max_new_tokens=self.max_new_tokens)
    return demonstrated(records, tokenizer, **sizes, cut=cut)

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    draw_rows = self._row_sampler(context, self.behavior_policy, self.samples_per_prompt)
    draw_baselines = None
    if self.baseline_samples:
      # A seed that no phase has: a baseline must not draw the noise of what it is compared with.
      other = context._replace(seed=~context.seed)
      draw_baselines = self._row_sampler(other, self.baseline_policy, self.baseline_samples)
    return RolloutSteps(
      settings=self,
      draw_rows=draw_rows,
      draw_baselines=draw_baselines,
      **common(
        context,
        temperature=self.temperature,
        recompute_proximal=self.recompute_proximal,
        mask_truncated=self.mask_truncated,
        stats=self.stats,
      ),
    ).collect

  def _row_sampler(
    self, context: Context, behavior_policy: Callable, samples_per_prompt: int
  ) -> 'RowSampler':
    same = ('slots', 'max_new_tokens', 'temperature', 'top_k', 'top_p')
    settings = {name: getattr(self, name) for name in same} | {
      'samples_per_prompt': samples_per_prompt,
      'behavior_policy': behavior_policy,
    }
    return RowSampler(
      context=context,
      # Prompts alone: `lay_out` of this class would lay out the demonstrations too.
      lay_out=functools.partial(super().lay_out, tokenizer=context.tokenizer, cut=self.cut),
      samples_per_prompt=samples_per_prompt,
      reads=inputs(behavior_policy),
      sample=make_drawer(context, settings),
    )


def _check_counts(settings: Rollouts) -> None:
  fraction, replay = settings.replay_fraction, settings.replay
  if not 0 <= fraction <= 1 or bool(fraction) != bool(replay):
    raise ValueError(
      'Rollouts: replay_fraction must be 0 without replay, and in (0, 1] with it; '
      f'got replay={replay}, replay_fraction={fraction}'
    )
  greedy = unbound(settings.baseline_policy) is behavior_policies.greedy
  if not greedy and not settings.baseline_samples:
    raise ValueError('Rollouts: baseline_policy draws nothing, because baseline_samples is 0')
  if settings.demonstrations not in (0, 1):
    raise ValueError(
      f'Rollouts: demonstrations must be 0 or 1, got {settings.demonstrations}: a record has one '
      'answer'
    )


def _check_stats(stats: Mapping[str, Callable]) -> None:
  for name, stat in stats.items():
    if name in RESERVED:
      raise ValueError(f'Rollouts: stats.{name}: the name is taken; taken are {sorted(RESERVED)}')
    if 'teacher_logits' in inputs(stat):
      raise ValueError(f'Rollouts: stats.{name} reads teacher_logits; only the policy is there')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampler:
  """Samples completions of records with one behavior policy."""

  context: Context
  lay_out: Callable[[Sequence[dict]], Prompts]
  samples_per_prompt: int
  reads: tuple[str, ...]  # parameter sets of the behavior policy
  sample: Callable  # from `make_sampler`

  def __call__(
    self, state: TrainState, records: Sequence[dict], step: int, before: Sequence[int] = ()
  ) -> Batch:
    """Completions of the records, NumPy.

    Args:
      before: ids of records whose completions the step has drawn already: noise is not drawn again.
    """
    context = self.context
    prompts = self.lay_out(records)
    params = parameter_sets(state, context.frozen)
    batch = self.sample(
      {name: params[name] for name in self.reads},
      prompts.tokens,
      prompts.mask,
      distinct(prompts.ids, before),
      seed=context.seed,
      step=step,
    )
    # The sampler got ids that differ where a prompt is there twice.
    ids = np.repeat(prompts.ids, self.samples_per_prompt)
    return to_host(batch).replace(prompt_ids=ids)


def make_drawer(context: Context, settings: Mapping) -> Callable:
  """The sampler of these settings, with the tokenizer and the devices of the run."""
  tokenizer = context.tokenizer
  return make_sampler(
    context.frozen,
    default=context.policy,
    mesh=context.mesh,
    stop_ids=tokenizer.stop_ids,
    stop_table=stopping.for_policy(tokenizer, context.policy),
    pad_id=tokenizer.pad_id,
    **settings,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSteps(Steps):
  """The steps of `Rollouts`."""

  settings: Rollouts
  draw_rows: RowSampler
  draw_baselines: RowSampler | None  # None: there are no baselines

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Batch, Sequence[dict]]:
    records = draw(self.settings.prompts)
    return self._draw(self.draw_rows, state, records, step), records

  def score(
    self, batch: Batch, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    """Scores the rows, replaces uninformative groups, and adds demonstrations and baselines."""
    batch, texts = score_rows(batch, records, self.context)
    batch, texts = self._resample(batch, texts, state, draw, step)
    report = Report.of(batch, texts)
    if self.settings.demonstrations:
      batch, report = self._add_demonstrations(batch, texts.records, report)
    if self.draw_baselines is not None:
      batch, report = self._add_baselines(batch, texts.records, report, state, step)
    return batch, report

  def exchange(
    self, batch: Batch, memory: replays.Ring | tuple, random: np.random.Generator
  ) -> tuple[Batch, replays.Ring | tuple]:
    """Stores the batch, and takes out the one to train on, if `lag` or `replay` need a memory."""
    if not memory:
      return batch, memory
    memory = replays.stored(memory, batch)
    settings = self.settings
    taken = replays.recalled(
      memory,
      lag=settings.lag,
      fraction=settings.replay_fraction,
      rows_per_prompt=settings.rows_per_prompt,
      random=random,
    )
    return taken, memory

  def _draw(self, sampler: RowSampler, *arguments: Any) -> Batch:
    """Rows of a sampler, on the clock of the rollout."""
    with self.meter.timing('rollout'):
      return self.count(sampler(*arguments), sampler.samples_per_prompt)

  def _resample(
    self, batch: Batch, texts: Texts, state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Texts]:
    """Dynamic sampling: replaces groups with equal rewards by groups of further prompts."""
    samples, ignored = self.settings.samples_per_prompt, self.settings.resample_ignores
    drawn = [record['id'] for record in texts.records]  # a small data set gives a prompt again
    for _ in range(self.settings.max_resamples):
      useful = informative(batch, texts, samples, ignored)
      if useful.all():
        break
      records = draw(self.settings.prompts)
      rows = self._draw(self.draw_rows, state, records, step, drawn)
      fresh = score_rows(rows, records, self.context)
      drawn += [record['id'] for record in records]
      batch, texts = replace_groups((batch, texts), fresh, useful, samples, ignored)
    return batch, texts

  def _add_demonstrations(
    self, batch: Batch, records: Sequence[dict], report: Report
  ) -> tuple[Batch, Report]:
    """Adds the record's answer to each group, behind its samples, and the stream of each row."""
    settings, prompts = self.settings, len(records)
    answers = settings.demonstrated(records, self.context.tokenizer, cut=settings.cut)
    answers, texts = score_rows(answers, records, self.context)

    def join(x, y):
      groups = np.concatenate([x.reshape(prompts, -1, *x.shape[1:]), y[:, None]], axis=1)
      return groups.reshape(-1, *x.shape[1:])

    group = ['sampled'] * settings.samples_per_prompt + ['demonstration']
    stream = np.array([STREAMS.index(name) for name in group], np.int32)
    batch = jax.tree.map(join, batch, answers).replace(stream=np.tile(stream, prompts))
    terms = {name: join(x, texts.scores.components[name]) for name, x in report.terms.items()}
    report = report._replace(terms=terms)
    return batch, report.beside('demonstration', answers, texts.scores)

  def _add_baselines(
    self, batch: Batch, records: Sequence[dict], report: Report, state: TrainState, step: int
  ) -> tuple[Batch, Report]:
    """Samples and scores the baseline of each prompt, and gives its rewards to the prompt's rows."""
    others = self._draw(self.draw_baselines, state, records, step)
    others, texts = score_rows(others, records, self.context)
    spread = lambda x: np.repeat(x.reshape(len(records), -1), self.settings.rows_per_prompt, axis=0)
    # Without its whole baseline a prompt has no advantages.
    valid = batch.valid & spread(others.valid).all(axis=1)
    batch = batch.replace(baseline_rewards=spread(others.rewards), valid=valid)
    return batch, report.beside('baseline', others, texts.scores)
