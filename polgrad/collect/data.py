"""Batches of given completions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from polgrad import speed
from polgrad.collect.base import (
  Annotator,
  Collect,
  Collected,
  Collector,
  Context,
  Draw,
  make_annotator,
)
from polgrad.data import batching, pair_fields
from polgrad.data.tokenizers import Tokenizer
from polgrad.registry import AtLeastOne, Count
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations(Collector):
  """Prompts with their `answer`."""

  # Records of a batch, one row each.
  rows: AtLeastOne = 32
  # Largest number of tokens of a row; see `overlong`.
  length: AtLeastOne = 128

  @property
  def records(self) -> int:
    return self.rows

  @property
  def fields(self) -> tuple[str, ...]:
    return ('answer',)

  @property
  def rows_per_prompt(self) -> int:
    return 1

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    return batching.supervised(records, tokenizer, length=self.length, cut=cut)

  def make(self, context: Context) -> Collect:
    return _given(self, context).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(Collector):
  """Prompts with a `chosen` and a `rejected` completion: two rows each, chosen first."""

  # Records of a batch.
  pairs: AtLeastOne = 16
  # Largest number of tokens of a row; see `overlong`.
  length: AtLeastOne = 128
  # 0 pads rows on the right only; otherwise the number of tokens that prompts are left-padded to, so
  # that the phase can share the prompts of its pairs (`share_prompts`); see `overlong`.
  prompt_length: Count = 0
  # Numbers that every record has and the objective reads, the same in both rows of a pair: name of the
  # array -> field of the record, as in {'margins': 'margin'}.
  numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Whether records may have weights of tokens, `chosen_weights` and `rejected_weights`.
  token_weights: bool = False

  @property
  def records(self) -> int:
    return self.pairs

  @property
  def fields(self) -> tuple[str, ...]:
    return ('chosen', 'rejected')

  @property
  def rows_per_prompt(self) -> int:
    return 2

  @property
  def provides(self) -> frozenset[str]:
    return frozenset({'label', *self.numbers, *(['token_weights'] if self.token_weights else [])})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    sizes = dict(length=self.length, prompt_length=self.prompt_length)
    batch = batching.pairs(records, tokenizer, **sizes, cut=cut)
    found = pair_fields.numbers(records, self.numbers)
    if self.token_weights:
      found['token_weights'] = pair_fields.token_weights(records, batch.mask, cut=cut)
    return batch.with_arrays(**found)

  def make(self, context: Context) -> Collect:
    return _given(self, context).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
  """Collects completions that the data hold."""

  records: int
  lay: Callable[[Sequence[dict]], Batch]  # records to rows
  annotate: Annotator
  meter: speed.Meter = dataclasses.field(default_factory=speed.Meter)

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    del step
    with self.meter.timing('annotation'):
      batch = self.annotate(state, self.lay(draw(self.records)))
      self.meter.add('annotation', self.annotate.flops(batch))
    return Collected(
      batch=batch.replace(layout=self.annotate.context.layout),
      credit_state=to_host(state.credit_state),
      collect_state=(),
      metrics={'length': float(batch.mask.sum() / len(batch.mask)), **self.meter.take()},
      samples=[],
      messages=[],
    )


def _given(settings: Demonstrations | Preferences, context: Context) -> _Given:
  return _Given(
    records=settings.records,
    lay=functools.partial(settings.lay_out, tokenizer=context.tokenizer, cut=settings.cut),
    annotate=make_annotator(context, settings.temperature),
  )
