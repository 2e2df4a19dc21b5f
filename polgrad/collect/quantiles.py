"""Rollouts that the policy is told the quality of: a pool of rows, cut into quantiles of the reward."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from polgrad.collect import replay as replays
from polgrad.collect.base import Collect, Context, Draw
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import OTHER_ROWS, Rollouts
from polgrad.collect.row_sampler import RowSampler
from polgrad.collect.steps import Report
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.registry import AtLeastOne, Range, suggest
from polgrad.sharding import to_host
from polgrad.types import Batch, Prompts, TrainState

NUMBER = '{k}'
MOST_LABELS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantiles(Rollouts):
  """Random rows of a pool of rollouts, each behind a label of its quantile (Quark, arXiv:2205.13636).

  Every `interval` batches the policy is sampled, behind the label of the best quantile, and the rows
  join the pool; the first ones are drawn without a label. Then the whole pool is sorted by reward and
  cut into equal parts. With `terms`, each of these terms of the reward has its own number in the label,
  by its own order of the pool, as the attributes of STEER (arXiv:2311.07167). The feature `policy_only`
  marks the tokens of the label, which anchors and verifiers do not read. Evaluations ask behind the
  label of the best quantile.
  """

  # Number of parts, K; part 0 has the largest rewards.
  quantiles: Annotated[int, Range(at_least=1, at_most=100)] = 5
  # Text of a label, which comes before all other tokens. It has {k}, or {NAME} of each name in `terms`.
  label: str = '[quality {k}]\n'
  # Tokens of a label, at most: columns of `prompt_length` that a prompt leaves free.
  label_length: AtLeastOne = 8
  # Batches from one sampling to the next.
  interval: AtLeastOne = 1
  # Sampled batches of the pool; beyond it the oldest are forgotten.
  pool: AtLeastOne = 64
  # Field of the records, such as the style that is asked for: rows whose records have equal values are
  # sorted among themselves, as the code of STEER does. '' sorts the whole pool.
  strata_field: str = ''

  def __post_init__(self):
    super().__post_init__()
    names = (*OTHER_ROWS, 'max_resamples', 'samples_per_prompt')
    self.refuse('a batch has single rows of a pool', *names)
    for mark in self.marks:
      if mark not in self.label:
        raise ValueError(f'Quantiles: label={self.label!r} must have {mark}')
    if (count := self.quantiles ** len(self.marks)) > MOST_LABELS:
      raise ValueError(
        f'Quantiles: quantiles={self.quantiles} for each of {[*self.terms]} make {count} labels, more '
        f'than {MOST_LABELS}; take fewer of either'
      )
    if self.label_length >= self.prompt_length:
      raise ValueError(
        f'Quantiles: label_length={self.label_length} leaves no room for prompts in the '
        f'prompt_length={self.prompt_length}'
      )

  @classmethod
  def longest_prompt(
    cls, length: int, new: int, chat: bool, asked: Mapping[str, Any], *, sampled: bool = False
  ) -> int:
    before = super().longest_prompt(length, new, chat, asked, sampled=sampled)
    return before + asked.get('label_length', cls.label_length)

  @classmethod
  def asks_behind(cls, asked: Mapping[str, Any]) -> dict[str, Any]:
    label = asked.get('label', cls.label)
    for mark in marks_of(asked.get('terms', ())):
      label = label.replace(mark, '0')
    return {'label': label, 'label_length': asked.get('label_length', cls.label_length)}

  @property
  def marks(self) -> tuple[str, ...]:
    """What the text of a label has in the place of a number: of each term, or of the reward."""
    return marks_of(self.terms)

  @property
  def provides(self) -> frozenset[str]:
    return super().provides | {'policy_only'}

  @property
  def remembers_numbers(self) -> bool:
    return bool(self.strata_field)

  def init(self) -> replays.Ring:
    return replays.empty(self._blank(), capacity=self.pool)

  def check_texts(self, tokenizer: Tokenizer) -> None:
    super().check_texts(tokenizer)
    self.labels(tokenizer)

  def labels(self, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of all labels, the best first: one for each combination of the numbers of its marks.

    Raises:
      ValueError: one has characters without a token, or too many tokens, or two have the same tokens.
    """
    texts = []
    for numbers in itertools.product(range(self.quantiles), repeat=len(self.marks)):
      text = self.label
      for mark, k in zip(self.marks, numbers):
        text = text.replace(mark, str(k))
      texts.append(text)
    batching.check_text('label', ''.join(texts), tokenizer)
    found = _encoded(tokenizer.encode, tuple(texts))
    for ids in found:
      batching.check_label(ids, self.label_length)
    if len({*map(tuple, found)}) < len(found):
      raise ValueError(f'label: two labels of {self.label!r} have the same tokens')
    return found

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    own, room = self.own(tokenizer), self.prompt_length - self.label_length
    plain = batching.prompts(self.opened(records), own, length=room, cut=cut)
    return batching.widened(plain, self.label_length, own.pad_id)

  def make(self, context: Context) -> Collect:
    if context.layout.pack or context.layout.shared > 1:
      raise ValueError(
        'Quantiles: labels of rows differ, so it needs pack=0 and share_prompts=False'
      )
    context = self.within(context)
    found = self._parts(context)
    ids = self.labels(context.tokenizer)
    plain = functools.partial(self.lay_out, tokenizer=context.tokenizer, cut=self.cut)
    rows = found['draw_rows']
    found['draw_rows'] = dataclasses.replace(rows, lay_out=plain)
    best = dataclasses.replace(
      rows, lay_out=lambda records: batching.behind(plain(records), ids[0])
    )
    return QuantileSteps(**found, draw_best=best, ids=ids).collect


@functools.lru_cache(maxsize=4)
def _encoded(encode: Callable[[str], list[int]], texts: tuple[str, ...]) -> list[list[int]]:
  """The ids of each text; labels are asked for with every record."""
  return [encode(text) for text in texts]


def quantile_labels(rewards: np.ndarray, quantiles: int) -> np.ndarray:
  """The part of each row, i[n]: 0 for the largest rewards; of equal rewards the first row is the better.

  Parts have equal sizes, up to one row.

  >>> quantile_labels(np.array([0.1, 0.9, 0.5, 0.9]), 2)
  array([1, 0, 1, 0])
  """
  order = np.argsort(-np.asarray(rewards), kind='stable')
  found = np.empty(len(order), int)
  found[order] = np.arange(len(order)) * quantiles // len(order)
  return found


def stratified_labels(
  scores: Sequence[np.ndarray], strata: Sequence[Any], quantiles: int
) -> np.ndarray:
  """`combined_labels` of the rows of each stratum alone, i[n].

  >>> stratified_labels([np.array([0.9, 0.1, 0.4, 0.3])], ['a', 'a', 'b', 'b'], 2)
  array([0, 1, 0, 1])
  """
  found = np.zeros(len(strata), int)
  for value in sorted({*map(str, strata)}):
    rows = np.flatnonzero([str(one) == value for one in strata])
    found[rows] = combined_labels([one[rows] for one in scores], quantiles)
  return found


def combined_labels(scores: Sequence[np.ndarray], quantiles: int) -> np.ndarray:
  """The number of each row's label among all combinations of parts, i[n]: 0 is the best of all scores.

  >>> combined_labels([np.array([0.9, 0.1]), np.array([0.2, 0.3])], 2)
  array([1, 2])
  """
  found = np.zeros(len(scores[0]), int)
  for one in scores:
    found = found * quantiles + quantile_labels(one, quantiles)
  return found


def marks_of(terms: Sequence[str]) -> tuple[str, ...]:
  """What the text of a label has in the place of a number: of each term, or of the reward."""
  return tuple(f'{{{name}}}' for name in terms) or (NUMBER,)


def labelled(batch: Batch, labels: Sequence[list[int]]) -> Batch:
  """The rows (NumPy) behind their labels, with the feature `policy_only`."""
  where = batching.places(batch.segment_ids > 0, [len(label) for label in labels])
  tokens = batch.tokens.copy()
  tokens[where] = np.concatenate(labels)
  return batch.replace(
    tokens=tokens, segment_ids=np.where(where, np.int32(1), batch.segment_ids)
  ).with_arrays(policy_only=where.astype(np.float32))


def unlabelled(batch: Batch, size: int, pad_id: int) -> Batch:
  """The rows without the `size` first ids of each."""
  first = np.argmax(batch.segment_ids > 0, axis=1)[:, None]
  column = np.arange(batch.tokens.shape[1])[None, :]
  where = (column >= first) & (column < first + size)
  return batch.replace(
    tokens=np.where(where, np.int32(pad_id), batch.tokens),
    segment_ids=np.where(where, np.int32(0), batch.segment_ids),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantileSteps(RolloutSteps):
  """The steps of `Quantiles`."""

  settings: Quantiles
  draw_best: RowSampler
  ids: list[list[int]]  # of the labels, the best first

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    if step % self.settings.interval:
      memory = to_host(state.collect_state)
      newest = (int(memory.count) - 1) % self.settings.pool
      batches = memory.batches
      return Drawn(batches.replace(**{n: batches[n][newest] for n in batches.names()})), ()
    records = draw(self.settings.prompts)
    if step == 0:
      return self._draw(self.draw_rows, state, records, step), records
    rows = self._draw(self.draw_best, state, records, step)
    pad = self.context.tokenizer.pad_id
    return rows._replace(batch=unlabelled(rows.batch, len(self.ids[0]), pad)), records

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    if records:
      return super().score(rows, records, state, draw, step)
    return rows.batch, Report({}, [], [], {})  # the newest rows, which were judged before

  def exchange(self, batch: Batch, memory: Any, random: np.random.Generator) -> tuple[Batch, Any]:
    """Puts fresh rows into the pool, and takes random ones of it, behind their labels."""
    step = int(batch.sampled_at[0])
    if step % self.settings.interval == 0:
      memory = replays.stored(memory, batch)
    pool = replays.all_rows(memory)
    usable = np.flatnonzero(pool.valid)
    labels = np.zeros(len(pool.valid), int)
    if len(usable):
      scores = [pool[f'{name}_term'] for name in self.settings.terms] or [pool.rewards]
      parts = self.settings.quantiles
      strata = self._strata(pool.prompt_ids[usable])
      labels[usable] = stratified_labels([x[usable] for x in scores], strata, parts)
    choice = usable if len(usable) else np.arange(len(labels))
    count = len(batch.tokens)
    taken = random.choice(choice, size=count, replace=count > len(choice))
    rows = replays.rows_at(pool, taken).replace(group_ids=batch.group_ids)
    return labelled(rows, [self.ids[k] for k in labels[taken]]), memory

  def _strata(self, ids: np.ndarray) -> list:
    """The stratum of each row, by the number of its record."""
    name = self.settings.strata_field
    if not name:
      return [''] * len(ids)
    found = {}
    for row in {*ids.tolist()}:
      record = self.context.source[row]
      if name not in record:
        raise ValueError(
          f'Quantiles: strata_field: record {row} has no {name!r}{suggest(name, record)}'
        )
      found[row] = record[name]
    return [found[row] for row in ids.tolist()]
