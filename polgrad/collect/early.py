"""Demonstrations with running means of what the policy predicted for each of their tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polgrad import speed
from polgrad.collect.base import Annotator, Collect, Collected, Context, Draw, make_annotator
from polgrad.collect.data import Demonstrations
from polgrad.data.tokenizers import Tokenizer
from polgrad.losses import logit_stats
from polgrad.registry import AtLeastOne, Decay
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState


class Targets(NamedTuple):
  """The running means of `n` rows of the data, of their `T` tokens, for `k` tokens each."""

  owner: np.ndarray  # i32[n], row of the data whose means these are, -1: none
  tokens: np.ndarray  # i32[n, T, k]
  means: np.ndarray  # f32[n, T, k], 0 where there is none


def followed(
  tokens: np.ndarray, means: np.ndarray, found: np.ndarray, *, decay: float
) -> tuple[np.ndarray, np.ndarray]:
  """t <- decay t + (1 - decay) p, of which the k largest entries are kept.

  Entries that are not kept, and probabilities beyond the k largest, count as 0. With k = V it is exact.

  Args:
    tokens: i32[..., k], of the means.
    means: f32[..., k], t.
    found: f32[..., 2 k], what `logit_stats.most_likely` gave.

  Returns:
    The next tokens and means, from the largest mean on.
  """
  k = tokens.shape[-1]
  new, probs = found[..., :k].astype(np.int32), (1 - decay) * found[..., k:]
  old = decay * means
  same = (tokens[..., :, None] == new[..., None, :]) & (means[..., :, None] > 0)
  old = old + np.where(same, probs[..., None, :], 0).sum(-1)
  probs = np.where(same.any(-2), 0, probs)
  ids, values = np.concatenate([tokens, new], -1), np.concatenate([old, probs], -1)
  order = np.argsort(-values, axis=-1, kind='stable')[..., :k]
  take = lambda x: np.take_along_axis(x, order, -1)
  return take(ids), take(values).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyTargets(Demonstrations):
  """Prompts with their `answer`, and running means of what the policy predicted for each of its tokens.

  Every time that a row of the data is drawn, t <- decay t + (1 - decay) p at each of its tokens, where p
  is the next-token distribution under the policy at that time; t begins at 0. The features
  `early_tokens` and `early_targets` have the `top` largest entries of t. The means are part of the
  checkpoint: 8 bytes * memory * length * top.
  """

  # Weight of the earlier predictions of the row.
  decay: Decay = 0.7
  # Tokens whose running means are kept, at each token of the row.
  top: AtLeastOne = 16
  # Rows of the data whose means are kept. A row whose number is equal to that of another one modulo this
  # takes the place of the other one, so it should be at least the number of rows.
  memory: AtLeastOne = 4096

  @property
  def provides(self) -> frozenset[str]:
    return super().provides | {'early_tokens', 'early_targets'}

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    """The rows, without means: held-out rows have none."""
    batch = super().lay_out(records, tokenizer=tokenizer, cut=cut)
    shape = len(batch.tokens), batch.tokens.shape[1] * self.top
    return batch.with_arrays(
      early_tokens=np.zeros(shape, np.int32), early_targets=np.zeros(shape, np.float32)
    )

  def init(self) -> Targets:
    shape = self.memory, self.length, self.top
    owner = np.full(self.memory, -1, np.int32)
    return Targets(owner, np.zeros(shape, np.int32), np.zeros(shape, np.float32))

  def make(self, context: Context) -> Collect:
    predicted = functools.partial(logit_stats.most_likely, k=self.top)
    annotate = make_annotator(context, self.temperature, stats={'predicted': predicted})
    return _Steps(settings=self, context=context, annotate=annotate).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
  """Lays rows out, predicts their tokens, and moves their means."""

  settings: EarlyTargets
  context: Context
  annotate: Annotator
  meter: speed.Meter = dataclasses.field(default_factory=speed.Meter)

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    del step
    settings, records = self.settings, draw(self.settings.records)
    with self.meter.timing('annotation'):
      batch = self.annotate(state, settings.laid_by(self.context.tokenizer)(records))
      self.meter.add('annotation', self.annotate.flops(batch))
    rows = np.array([record['id'] for record in records])
    memory = Targets(*to_host(state.collect_state))
    features = dict(batch.features)
    found = features.pop('predicted')
    batch = batch.replace(features=features)
    batch, memory, known = followed_rows(settings, batch, found, memory, rows)
    length = batch.mask.sum() / max(batch.mask.any(axis=1).sum(), 1)
    return Collected(
      batch=batch.replace(layout=self.annotate.context.layout),
      credit_state=to_host(state.credit_state),
      collect_state=memory,
      metrics={'length': float(length), 'rows_seen_before': known, **self.meter.take()},
      samples=[],
      messages=[],
    )


def followed_rows(
  settings: EarlyTargets, batch: Batch, found: np.ndarray, memory: Targets, rows: np.ndarray
) -> tuple[Batch, Targets, float]:
  """The batch with its targets, the next memory, and the fraction of rows that had means.

  Args:
    found: f32[B, T, 2 k], what `logit_stats.most_likely` gave.
    rows: i[B], rows of the data.
  """
  places = rows % settings.memory
  known = memory.owner[places] == rows
  means = np.where(known[:, None, None], memory.means[places], 0)
  tokens, means = followed(memory.tokens[places], means, found, decay=settings.decay)
  batch = batch.with_arrays(
    early_tokens=tokens.reshape(len(rows), -1), early_targets=means.reshape(len(rows), -1)
  )
  memory = Targets(*(x.copy() for x in memory))
  memory.owner[places], memory.tokens[places], memory.means[places] = rows, tokens, means
  return batch, memory, float(known.mean())
