"""Rollouts that start again from earlier attempts (ExIt, arXiv:2509.04575)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polgrad.collect import replay, starts
from polgrad.collect.base import Collect, Context, Draw, Filtering
from polgrad.collect.drawn import Drawn
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.steps import PROVIDED, Report, Steps, common
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments import conversation
from polgrad.registry import AtLeastOne, Fraction, NotNegative
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState

# Asks for another answer in a conversation, where `diverge` is ''.
DIVERGE = 'Reply with a better answer that takes a different approach.'
TURNS = 32  # tokens that the two further turns of a conversation are assumed to cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iterated(Filtering):
  """Rollouts, some of which improve an attempt that the policy made in an earlier step.

  A group starts from a data row, or from an entry of a buffer: a data row with earlier attempts at it,
  which its prompt shows before it asks for a better one. Both are scored by the same verifiers. After a
  group one of its completions is appended to the attempts, and the result enters the buffer as a
  further start. Its priority is the variance of the rewards of the group; when the start is used, the
  variance of its own group takes the place of that, unless its verifiers failed. Starts of variance 0
  leave the buffer, and if it is full, those of the lowest variance do.

  A prompt and its attempts must fit into `prompt_length`; a start that does not is left out and counted
  (`starts/too_long`).
  """

  # Probability that a group starts from a data row without attempts; 1 is plain rollouts.
  new: Fraction = 0.5
  # How starts of the buffer are drawn: proportionally to variance^exponent, or to rank^-exponent.
  by: starts.By = 'priority'
  # The exponent; 0 draws all of them alike.
  exponent: NotNegative = 1.0
  # Starts that the buffer holds.
  capacity: AtLeastOne = 256
  # Earlier attempts that a prompt shows, the last ones.
  shown: AtLeastOne = 1
  # Which completion of a group extends the attempts: a 'random' one, or one of the 'best' or 'worst'.
  extend: starts.Extend = 'random'
  # What asks for a better answer behind an attempt, see `batching.revision`; '' is `batching.REQUEST` in
  # a conversation, and elsewhere the prompt once more.
  request: str = ''
  # Probability that a group with attempts is asked for a different answer instead.
  divergence: Fraction = 0.0
  # What asks for it; '' is `DIVERGE` in a conversation, and elsewhere the prompt twice.
  diverge: str = ''

  def __post_init__(self):
    super().__post_init__()
    if self.has_environment:
      raise ValueError(
        'Iterated: an attempt is a completion of one turn; leave out the environment, or take a method '
        'without starts. environments.Attempts asks for several answers within an episode'
      )

  def check_texts(self, tokenizer: Tokenizer) -> None:
    super().check_texts(tokenizer)
    for field in ('request', 'diverge'):
      batching.check_text(field, getattr(self, field).replace('{prompt}', ''), tokenizer)

  @classmethod
  def longest_prompt(
    cls, length: int, new: int, chat: bool, asked: Mapping[str, Any], *, sampled: bool = False
  ) -> int:
    del sampled
    words = [asked.get('request', ''), asked.get('diverge', ''), DIVERGE if chat else '']
    again = max(len(text.encode()) for text in words)
    again = again + TURNS if chat else max(again, length * (2 if asked.get('divergence') else 1))
    return length + asked.get('shown', 1) * (new + again)

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED

  @property
  def remembers_numbers(self) -> bool:
    return True

  def init(self) -> starts.Starts:
    return starts.empty(self.capacity, self.shown, self.max_new_tokens)

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    return IteratedSteps(
      settings=self,
      draw_rows=make_row_sampler(self, context, self.samples_per_prompt),
      **common(self, context, recompute_proximal=self.recompute_proximal),
    ).collect

  def asking(self, record: Mapping, diverge: bool) -> str:
    """What asks for another answer to the record."""
    if not diverge:
      return self.request
    return self.diverge or (DIVERGE if 'messages' in record else '{prompt}{prompt}')

  def record(self, start: starts.Start, context: Context, *, diverge: bool = False) -> dict:
    """The record whose prompt shows the attempts of a start.

    Args:
      context: of the phase, with its source.
      diverge: whether the last request asks for a different answer.
    """
    base = {**context.source[start.row], 'id': start.row}
    record, opened = base, batching.opening(base, context.tokenizer)
    for number, ids in enumerate(start.attempts):
      last = number == len(start.attempts) - 1
      text = conversation.turn_text(ids, context.tokenizer, ended=False, opened=opened)
      asking = self.asking(base, diverge and last)
      # The request names the prompt of the record, not that with the attempts before.
      asking = asking or ('' if 'messages' in base else '{prompt}')
      asking = asking.replace('{prompt}', base.get('prompt', ''))
      record = batching.revision(record, text, asking)
    return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class IteratedSteps(Steps):
  """The steps of `Iterated`: where groups start, and what of them is remembered."""

  settings: Iterated
  draw_rows: RowSampler

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    settings, memory = self.settings, self._known(to_host(state.collect_state))
    random = np.random.default_rng((self.context.seed, step, 7))
    how = dict(new=settings.new, by=settings.by, exponent=settings.exponent)
    places = starts.chosen(memory, settings.prompts, random, **how)
    diverge = random.random(len(places)) < settings.divergence
    fresh = int(np.sum(places < 0))
    tasks = iter(draw(fresh) if fresh else ())
    records = [
      next(tasks)
      if place < 0
      else settings.record(starts.start(memory, place), self.context, diverge=bool(other))
      for place, other in zip(places, diverge)
    ]
    rows = self.count(self.draw_rows(state, records, step), settings.samples_per_prompt)
    started = np.repeat(places, settings.samples_per_prompt).astype(np.int32)
    return rows._replace(batch=rows.batch.with_arrays(started=started)), records

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    batch, report = super().score(rows, records, state, draw, step)
    memory, started = to_host(state.collect_state), batch['started']
    # A curriculum learns how hard a data row is from those groups that saw no attempt at it.
    alone = report.sampled.valid & (started < 0)
    report = report._replace(sampled=report.sampled._replace(valid=alone))
    used = memory.priorities > 0
    mean = lambda x, where: float(np.mean(x[where])) if where.any() else float('nan')
    report.metrics.update(
      {
        'starts/new': float(np.mean(started < 0)),
        'starts/depth': mean(memory.depths[started], started >= 0),
        'starts/filled': float(np.mean(used)),
        'starts/priority': mean(memory.priorities, used),
        'starts/too_long': float(memory.too_long),
        'reward_of_new': mean(batch.rewards, (started < 0) & batch.valid),
        'reward_of_continued': mean(batch.rewards, (started >= 0) & batch.valid),
      }
    )
    return batch, report

  def exchange(
    self, batch: Batch, memory: starts.Starts, random: np.random.Generator
  ) -> tuple[Batch, starts.Starts]:
    """The batch, and the buffer with what its groups say of their starts and add to them."""
    features = dict(batch.features)
    size = self.settings.samples_per_prompt
    places = features.pop('started')[::size]
    batch = batch.replace(features=features)
    rewards, valid = batch.rewards.reshape(-1, size), batch.valid.reshape(-1, size)
    found = replay.variances(rewards, valid)
    # A generator beside that of the step, whose other numbers are those of plain rollouts.
    (own,) = random.spawn(1)
    taken = starts.picked(rewards, valid, own, extend=self.settings.extend)
    further = [
      self._extended(batch, memory, group * size + int(row), int(places[group]), found[group])
      for group, row in enumerate(taken)
      if found[group] > 0
    ]
    fitting = [one for one in further if self._fits(one)]
    # A group whose verifiers failed says nothing of its start, which keeps its priority.
    known = np.where(valid.sum(axis=1) > 1, places, -1)
    memory = starts.pushed(starts.measured(memory, known, found), fitting)
    return batch, memory._replace(too_long=memory.too_long + np.int32(len(further) - len(fitting)))

  def _known(self, memory: starts.Starts) -> starts.Starts:
    """The buffer, if its rows are rows of the data."""
    rows, size = memory.rows[memory.priorities > 0], len(self.context.source)
    if len(rows) and rows.max() >= size:
      raise ValueError(
        f'the buffer of starts has row {rows.max()} of the data, but the source has {size} records: '
        'resume with the data that the run began with'
      )
    return memory

  def _extended(
    self, batch: Batch, memory: starts.Starts, row: int, place: int, variance: float
  ) -> starts.Start:
    """The start of a row's group with the row's completion behind it."""
    ids = batch.tokens[row][batch.mask[row]].tolist()
    if batch.finished[row] and ids and ids[-1] in self.context.tokenizer.stop_ids:
      ids = ids[:-1]
    before = starts.start(memory, place) if place >= 0 else None
    start = starts.extended(int(batch.prompt_ids[row]), before, ids, float(variance))
    return start._replace(attempts=start.attempts[-self.settings.shown :])

  def _fits(self, start: starts.Start) -> bool:
    """Whether prompts that show the start have room, whichever request they end with."""
    settings = self.settings
    asks = (False, True) if settings.divergence else (False,)
    records = [settings.record(start, self.context, diverge=diverge) for diverge in asks]
    try:
      self.draw_rows.lay_out(records)
    except batching.TooLong:
      return False
    return True
