"""Rollouts whose steps are valued by further completions (VinePPO, arXiv:2410.01679).

Each completion is cut into steps. From the state before each step a few further completions are drawn
and scored; their mean reward is an estimate of the value of this state, without a critic. They are not
trained on.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from polgrad.collect import splits
from polgrad.collect.base import Collect, Context, Draw
from polgrad.collect.continuations import Continuer, Prefixes, make_continuer
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import Rollouts
from polgrad.collect.scored import distinct, errors
from polgrad.collect.steps import Report
from polgrad.registry import AtLeastOne, Count
from polgrad.types import Batch, TrainState, turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vines(Rollouts):
  """Rollouts with the features `step_ids` and `step_values`: V(s), estimated before each step.

  V is the mean reward of `value_samples` completions that the policy draws from s, with the settings of
  the rollouts. Rows with equal prefixes share an estimate, such as that of the prompt. A row with a
  verifier that failed on one of them is not trained on. A step costs up to rows * most_steps *
  value_samples further completions.
  """

  # Where steps begin. With an environment every turn is a step, and this is not read.
  split: splits.Part = splits.lines
  # Largest number of steps of a completion; of more, some are joined.
  most_steps: AtLeastOne = 8
  # Completions that the value of a state is the mean of.
  value_samples: AtLeastOne = 9
  # Prefixes that are continued in one call of the sampler, a multiple of the devices; 0: as many as a
  # batch has rows.
  prefixes_at_a_time: Count = 0

  def __post_init__(self):
    super().__post_init__()
    if self.begins:
      raise ValueError(
        'Vines: with a beginning a completion is partly given, so its steps have no values'
      )

  @property
  def keeps_states(self) -> bool:
    return True

  def _shapes(self) -> dict[str, tuple]:
    values = {'step_ids': (np.int32, self.length), 'step_values': (np.float32, self.length)}
    return super()._shapes() | values

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    continuer = make_continuer(
      self,
      context,
      samples=self.value_samples,
      prefixes=self.prefixes_at_a_time or self.rows,
      behavior_policy=self.behavior_policy,
    )
    pieces = context.tokenizer.pieces
    return VineSteps(
      **self._parts(context),
      continuer=continuer,
      pieces=None if pieces is None else pieces(False),
    ).collect


class Values(NamedTuple):
  """What was found of the states before steps, [n]."""

  mean: np.ndarray  # f64, mean reward of the completions; 0 where one has failed
  valid: np.ndarray  # bool, no verifier has failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class VineSteps(RolloutSteps):
  """The steps of `Vines`: after scoring, values are estimated for the rows that are trained on."""

  settings: Vines
  continuer: Continuer
  pieces: Sequence[bytes] | None  # text of each token; None: tokens are decoded one by one

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    known = {record['id']: record for record in records}

    def noted(count: int) -> list[dict]:
      """Further records, which dynamic sampling draws."""
      drawn = draw(count)
      known.update((record['id'], record) for record in drawn)
      return drawn

    batch, report = super().score(rows, records, state, noted, step)
    return self._add_values(batch, report, known, state, step)

  def _add_values(
    self,
    batch: Batch,
    report: Report,
    records: Mapping[int, dict],
    state: TrainState,
    step: int,
  ) -> tuple[Batch, Report]:
    """Fills in `step_ids` and `step_values`, and adds the metrics of the continuations."""
    step_ids = self._step_ids(batch)
    prefixes, which = distinct_prefixes(batch, step_ids, shared=not report.episodes)
    values, report = self._values(batch, prefixes, report, records, state, step)
    # Column by column: the value and the failures of the prefix that its step begins with.
    here = which >= 0
    found = np.where(here, np.append(values.mean, 0)[which], 0).astype(np.float32)
    failed = here & ~np.append(values.valid, True)[which]
    rows = batch.valid & ~failed.any(axis=1)
    # All continuations are drawn, so the states of episodes are not needed any more.
    report = report._replace(episodes=[episode.without_states() for episode in report.episodes])
    report.metrics['steps'] = _mean(step_ids[batch.valid].max(axis=1, initial=-1) + 1)
    return batch.with_arrays(step_ids=step_ids, step_values=found, valid=rows), report

  def _step_ids(self, batch: Batch) -> np.ndarray:
    """The number of the step of each token, i32[B, T]; -1 outside the mask."""
    step_ids = np.full(batch.tokens.shape, -1, np.int32)
    for row, (tokens, mask) in enumerate(zip(batch.tokens, batch.mask)):
      begins = self._begins(tokens, mask)
      step_ids[row, mask] = np.searchsorted(begins, np.arange(mask.sum()), side='right') - 1
    return step_ids

  def _begins(self, tokens: np.ndarray, mask: np.ndarray) -> list[int]:
    """The tokens of the mask that begin a step, by their number."""
    settings = self.settings
    if settings.has_environment:
      lengths = [span.stop - span.start for span in turns(mask)]
      return splits.joined(np.cumsum([0, *lengths[:-1]]).tolist(), settings.most_steps)
    pieces = [self._piece(int(token)) for token in tokens[mask]]
    return splits.starts(settings.split, pieces, settings.most_steps)

  def _piece(self, token: int) -> bytes:
    """The text that a token adds; special tokens have none."""
    if self.pieces is None:
      return self.context.tokenizer.decode([token]).encode()
    return self.pieces[token] if token < len(self.pieces) else b''

  def _values(
    self,
    batch: Batch,
    prefixes: Prefixes,
    report: Report,
    records: Mapping[int, dict],
    state: TrainState,
    step: int,
  ) -> tuple[Values, Report]:
    """The value of each prefix: all are continued, and what was drawn is scored."""
    size, samples = self.continuer.prefixes, self.settings.value_samples
    found, valid, tokens, failed, messages = [], [], 0, collections.Counter(), []
    for start in range(0, len(prefixes.rows), size):
      # One call of the sampler.
      piece = prefixes.taken(slice(start, start + size))
      own = [records[i] for i in batch.prompt_ids[piece.rows].tolist()]
      rows = self.continuer(state, batch, piece, step, self.meter, own, report.episodes)
      rows, texts = self._judge(rows, own)
      fresh = np.arange(rows.mask.shape[1]) >= np.repeat(piece.columns, samples)[:, None]
      # What turns before the prefix have earned is not part of its value.
      earned = rows.rewards
      if report.episodes:
        earned = np.where(fresh, rows['turn_rewards'], 0).sum(axis=1)
      tokens += int((rows.mask & fresh).sum())
      found.append(earned.reshape(-1, samples).astype(float))
      valid.append(rows.valid.reshape(-1, samples))
      failed.update(errors(texts.scores))
      messages += texts.scores.messages
    # [n, samples]; the first piece is empty, for a batch without prefixes.
    found, valid = (np.concatenate([np.zeros((0, samples)), *x]) for x in (found, valid))
    for name, number in failed.items():
      report.metrics[name] = report.metrics.get(name, 0.0) + number
    report.metrics['continuations/prefixes'] = float(len(found))
    report.metrics['continuations/tokens'] = float(tokens)
    report.metrics['reward_of_continuations'] = _mean(found[valid > 0])
    whole = (valid > 0).all(axis=1)
    values = Values(np.where(whole, found.mean(axis=1), 0), whole)
    return values, report._replace(messages=report.messages + messages)


def distinct_prefixes(
  batch: Batch, step_ids: np.ndarray, *, shared: bool = True
) -> tuple[Prefixes, np.ndarray]:
  """The different prefixes that steps of valid rows begin with, and for each token the number of its.

  Args:
    batch: rows, NumPy.
    step_ids: i32[B, T], number of the step of each token.
    shared: whether rows of one record with the same first tokens have one prefix, so that they share
      what is drawn from it. With an environment they may be in different states.

  Returns:
    The prefixes, and i32[B, T], the number of the prefix before the step of a token; -1 where the mask
    is False or the row is not valid.
  """
  which = np.full(step_ids.shape, -1, np.int32)
  seen, rows, columns = {}, [], []
  for row in np.flatnonzero(batch.valid):
    for number, column in zip(*np.unique(step_ids[row], return_index=True)):
      if number < 0:
        continue
      key = (int(batch.prompt_ids[row]), batch.tokens[row, :column].tobytes(), shared or row)
      if key not in seen:
        seen[key] = len(rows)
        rows.append(row)
        columns.append(column)
      which[row, step_ids[row] == number] = seen[key]
  rows, columns = np.array(rows, np.int32), np.array(columns, np.int32)
  return Prefixes(rows, columns, distinct(batch.prompt_ids[rows])), which


def _mean(x: np.ndarray) -> float:
  return float(x.mean()) if x.size else math.nan
