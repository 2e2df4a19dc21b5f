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
from polgrad.collect.rollouts import Rollouts, RolloutSteps
from polgrad.collect.scored import distinct
from polgrad.collect.steps import Report
from polgrad.registry import AtLeastOne, Count
from polgrad.types import Batch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vines(Rollouts):
  """Rollouts with the features `step_ids` and `step_values`: V(s), estimated before each step.

  V is the mean reward of `value_samples` completions that the policy draws from s, with the settings of
  the rollouts. Rows with equal prefixes share an estimate, such as that of the prompt. A row with a
  verifier that failed on one of them is not trained on. A step costs up to rows * most_steps *
  value_samples further completions.
  """

  # Where steps begin.
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
    if self.resets:
      raise ValueError(
        'Vines: with resets a completion is partly given, so its steps have no values'
      )

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
    """Fills in `step_ids` and `step_values`, and reports what that has cost."""
    step_ids = self._step_ids(batch)
    prefixes, which = distinct_prefixes(batch, step_ids)
    values, report = self._values(batch, prefixes, report, records, state, step)
    # Column by column: the value and the failures of the prefix that its step begins with.
    here = which >= 0
    found = np.where(here, np.append(values.mean, 0)[which], 0).astype(np.float32)
    failed = here & ~np.append(values.valid, True)[which]
    rows = batch.valid & ~failed.any(axis=1)
    report.metrics['steps'] = _mean(step_ids[batch.valid].max(axis=1, initial=-1) + 1)
    return batch.with_arrays(step_ids=step_ids, step_values=found, valid=rows), report

  def _step_ids(self, batch: Batch) -> np.ndarray:
    """The number of the step of each token, i32[B, T]; -1 outside the mask."""
    step_ids = np.full(batch.tokens.shape, -1, np.int32)
    for row, (tokens, mask) in enumerate(zip(batch.tokens, batch.mask)):
      pieces = [self._piece(int(token)) for token in tokens[mask]]
      begins = splits.starts(self.settings.split, pieces, self.settings.most_steps)
      step_ids[row, mask] = np.searchsorted(begins, np.arange(len(pieces)), side='right') - 1
    return step_ids

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
    """Continues all prefixes and scores what was drawn."""
    size, samples = self.continuer.prefixes, self.settings.value_samples
    rewards, valid, tokens, errors = [], [], 0, collections.Counter()
    for start in range(0, len(prefixes.rows), size):
      piece = prefixes.taken(slice(start, start + size))
      rows = self.continuer(state, batch, piece, step, self.meter)
      rows, texts = self._judge(
        Drawn(rows), [records[i] for i in batch.prompt_ids[piece.rows].tolist()]
      )
      given = np.repeat(piece.columns, samples)[:, None]
      tokens += int((rows.mask & (np.arange(rows.mask.shape[1]) >= given)).sum())
      rewards.append(rows.rewards.reshape(-1, samples).astype(float))
      valid.append(rows.valid.reshape(-1, samples))
      errors.update(texts.scores.errors)
      report = report._replace(messages=report.messages + texts.scores.messages)
    rewards, valid = (np.concatenate([np.zeros((0, samples)), *x]) for x in (rewards, valid))
    whole = (valid > 0).all(axis=1)
    errors = {f'verifier_errors/{name}': float(n) for name, n in errors.items()}
    errors['verifier_errors'] = float((valid == 0).sum())
    report.metrics.update({name: n + report.metrics.get(name, 0.0) for name, n in errors.items()})
    report.metrics['continuations/prefixes'] = float(len(rewards))
    report.metrics['continuations/tokens'] = float(tokens)
    report.metrics['reward_of_continuations'] = _mean(rewards[valid > 0])
    return Values(np.where(whole, rewards.mean(axis=1), 0), whole), report


def distinct_prefixes(batch: Batch, step_ids: np.ndarray) -> tuple[Prefixes, np.ndarray]:
  """The different prefixes that steps of valid rows begin with, and for each token the number of its.

  Rows of one record with the same first tokens have one prefix, so they share what is drawn from it.

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
      key = (int(batch.prompt_ids[row]), batch.tokens[row, :column].tobytes())
      if key not in seen:
        seen[key] = len(rows)
        rows.append(row)
        columns.append(column)
      which[row, step_ids[row] == number] = seen[key]
  rows, columns = np.array(rows, np.int32), np.array(columns, np.int32)
  return Prefixes(rows, columns, distinct(batch.prompt_ids[rows])), which


def _mean(x: np.ndarray) -> float:
  return float(x.mean()) if x.size else math.nan
