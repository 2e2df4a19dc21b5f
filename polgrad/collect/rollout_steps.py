"""The steps of `Rollouts`: what it draws, adds to groups, remembers and chooses."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from polgrad.collect import old_runs, parts, picks
from polgrad.collect import replay as replays
from polgrad.collect.base import Draw
from polgrad.collect.drawn import Drawn, with_rewards
from polgrad.collect.row_sampler import RowSampler
from polgrad.collect.scored import (
  Texts,
  begun,
  compare_groups,
  compare_with,
  completions,
  informative,
  joined,
  joined_rows,
  pooled,
  replace_groups,
  replacements,
  score_rows,
)
from polgrad.collect.steps import Report, Steps, sampled_of
from polgrad.compiling import jit
from polgrad.curricula import Sampled
from polgrad.losses import selections
from polgrad.models.policy import Policy, labelled, learned, overlay
from polgrad.registry import inputs
from polgrad.sharding import copied, param_shardings, to_host
from polgrad.types import STREAMS, Batch, Params, TrainState

if TYPE_CHECKING:  # rollouts.py imports this module
  from polgrad.collect.rollouts import Rollouts

PAIR = ('chosen', 'rejected')  # fields of a record with a preference
TRACE = 'trace'  # field of the completion that was drawn of several


class Measured(NamedTuple):
  """What a collector remembers whose sampler reads the entropies of the batch before."""

  memory: Any  # of `lag` and `replay`
  entropy_levels: np.ndarray  # f32[3], see `selections.entropy_levels`; 0 before the first batch


def traces_of(record: Mapping[str, Any], field: str) -> Sequence[Any]:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSteps(Steps):
  """The steps of `Rollouts`."""

  settings: 'Rollouts'
  draw_rows: RowSampler
  draw_baselines: RowSampler | None  # None: there are no baselines
  draw_opponents: RowSampler | None  # None: there are no opponents
  old: Batch | None = None  # rows of earlier runs; None: there are none
  lent_once: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `lent`

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
    policy, frozen = self.context.policy, self.context.frozen
    anchors = {name: state.anchors[name] for name in settings.anchors_read}
    to = mesh or self.context.mesh
    send = lambda tree, model=policy: copied(to, self.rounded(model, tree))
    with self.meter.timing('transfer'):
      # What no update changes is copied once: the base of an adapter, and other models.
      if 'base' not in self.lent_once:
        self.lent_once['base'] = send(labelled(policy, state.params, 'frozen'))
        models = {n: x for n, x in anchors.items() if n in frozen}
        self.lent_once['models'] = {n: send(x, frozen[n]) for n, x in models.items()}
      own = {name: x for name, x in anchors.items() if name not in frozen}
      sent = send(learned(policy, state.params)), {name: send(x) for name, x in own.items()}
      self.meter.move('transfer', sent)
      jax.block_until_ready(sent)
    params, anchors = overlay(self.lent_once['base'], sent[0]), self.lent_once['models'] | sent[1]
    return state.replace(params=params, anchors=anchors, opt_state=(), learned={})

  def rounded(self, policy: Policy, params: Params) -> Params:
    """Parameters of a model, or a part of them, in the type in which the sampler has them."""
    mesh, round_ = self.context.mesh, self.context.engine.rounded(policy)
    shapes = jax.eval_shape(round_, params)
    same = jax.tree.structure(shapes) == jax.tree.structure(params)
    places = param_shardings(mesh, policy.axes(params), shapes)
    return params if same else jit(round_, out_shardings=places)(params)

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
    self,
    memory: replays.Ring,
    random: np.random.Generator,
    step: int,
    coming: int = 0,
    lag: int | None = None,
  ) -> Batch:
    """The batch of a ring to train on in a step, see `replay.recalled`; `lag` None is the setting."""
    settings = self.settings
    return replays.recalled(
      memory,
      lag=settings.lag if lag is None else lag,
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
      traces = [traces_of(record, settings.traces) for record in whole]
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
