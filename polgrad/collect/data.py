"""Batches of given completions."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from polgrad import speed
from polgrad.collect.base import (
  Annotator,
  Collect,
  Collected,
  Collector,
  Context,
  Draw,
  laid_out,
  make_annotator,
)
from polgrad.data import batching, pair_fields, user_pairs
from polgrad.data.tokenizers import Tokenizer
from polgrad.registry import AtLeastOne, Count, Range
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Collector):
  """A collector of completions that the data hold: the interface of those below."""

  # Largest number of tokens of a row; see `overlong`.
  length: AtLeastOne = 128
  # Of records from which nothing can be learned, or of which a field is missing or makes no sense:
  # 'error' refuses them, 'drop' takes the next one instead.
  unusable: batching.OnUnusable = 'error'

  @abc.abstractmethod
  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    """The rows of these records, each of which has an `id`.

    Raises:
      TooLong: a record that does not fit the lengths, even if it is cut where `cut` allows that.
      Unusable: a field is missing or makes no sense, or there is nothing to learn.
      ValueError: a conversation or text that cannot be laid out.
    """

  def kind(self, record: Mapping) -> str:
    """A name under which the metrics of held-out records are reported as well; '' for none."""
    del record
    return ''

  def laid_by(self, tokenizer: Tokenizer) -> Callable[[Sequence[dict]], Batch]:
    """`lay_out` with these settings, divided over the processes where rows do not depend on others."""
    lay = functools.partial(self.lay_out, tokenizer=tokenizer, cut=self.cut)
    return functools.partial(laid_out, lay) if self.lays_apart else lay

  def make(self, context: Context) -> Collect:
    return _Given(
      records=self.records,
      lay=self.laid_by(context.tokenizer),
      annotate=make_annotator(context, self.temperature),
    ).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations(Given):
  """Prompts with their `answer`."""

  # Records of a batch, one row each.
  rows: AtLeastOne = 32
  # Numbers that every record has and the objective reads: name of the array -> field of the record, as
  # in {'target': 'rating'}.
  numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def records(self) -> int:
    return self.rows

  @property
  def fields(self) -> tuple[str, ...]:
    return ('answer',)

  @property
  def rows_per_prompt(self) -> int:
    return 1

  @property
  def provides(self) -> frozenset[str]:
    return frozenset(self.numbers)

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    batch = batching.supervised(records, tokenizer, length=self.length, cut=cut)
    return batch.with_arrays(**pair_fields.numbers(records, self.numbers, rows=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Given):
  """A collector of records with a `chosen` and a `rejected` completion: the interface of those below."""

  # Records of a batch.
  pairs: AtLeastOne = 16

  @property
  def records(self) -> int:
    return self.pairs

  @property
  def fields(self) -> tuple[str, ...]:
    return ('chosen', 'rejected')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(Pairs):
  """Prompts with a `chosen` and a `rejected` completion: two rows each, chosen first."""

  # 0 pads rows on the right only; otherwise the number of tokens that prompts are left-padded to, so
  # that the phase can share the prompts of its pairs (`share_prompts`); see `overlong`.
  prompt_length: Count = 0
  # Numbers that every record has and the objective reads, the same in both rows of a pair: name of the
  # array -> field of the record, as in {'annotated_margin': 'margin'}.
  numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Names of those arrays whose numbers must be at least 0.
  not_negative: tuple[str, ...] = ()
  # Whether records may have weights of tokens, `chosen_weights` and `rejected_weights`.
  token_weights: bool = False
  # Completion that a row has read before its own: 'other' is that of the pair's other row, another name
  # is a field of the record, '' is none; see `batching.pairs`.
  before: str = ''

  def __post_init__(self):
    if self.before == 'other' and self.prompt_length:
      raise ValueError(
        f"before='other' and prompt_length={self.prompt_length}: the rows of a pair read different "
        'completions first, so they share no prompt'
      )

  @classmethod
  def longest_row(cls, length: int, asked: Mapping) -> int:
    return 2 * length if asked.get('before') else length

  @property
  def rows_per_prompt(self) -> int:
    return 2

  @property
  def provides(self) -> frozenset[str]:
    own = ['token_weights'] if self.token_weights else []
    return frozenset({'label', *self.numbers, *own})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    sizes = dict(length=self.length, prompt_length=self.prompt_length, before=self.before)
    batch = batching.pairs(records, tokenizer, **sizes, cut=cut)
    found = pair_fields.numbers(records, self.numbers, not_negative=self.not_negative)
    if self.token_weights:
      found['token_weights'] = pair_fields.token_weights(records, batch.mask, cut=cut)
    return batch.with_arrays(**found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revisions(Pairs):
  """Pairs for a policy that improves answers: each completion after the prompt, and after prompts that
  show a completion and ask for a better one. Six rows a record, see `batching.revisions`."""

  # What asks for a better completion: the user's turn, or text behind the completion, in which
  # '{prompt}' is the prompt. '' is the usual one, see `batching.revision`.
  request: str = ''

  @classmethod
  def longest_row(cls, length: int, asked: Mapping) -> int:
    request = asked.get('request') or batching.REQUEST
    return 2 * length + len(request.encode())

  @property
  def rows_per_prompt(self) -> int:
    return 6

  @property
  def provides(self) -> frozenset[str]:
    return frozenset({'label', 'shown_label'})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    sizes = dict(length=self.length, request=self.request)
    return batching.revisions(records, tokenizer, **sizes, cut=cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserPreferences(Pairs):
  """Pairs of a `chosen` and a `rejected` completion, each with other pairs of its user, the `context`.

  Records are those of `sources.with_context`. Each has 2 + 2 * `context` rows; the loss looks at the
  first two.
  """

  # Other pairs of a record.
  context: AtLeastOne = 8
  # Field of the records with the user.
  user: str = 'user'

  @property
  def rows_per_prompt(self) -> int:
    return 2 + 2 * self.context

  @property
  def provides(self) -> frozenset[str]:
    return frozenset({'label', 'uniform'})

  def kind(self, record: Mapping) -> str:
    return f'{self.user}={record.get(self.user)}'

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    sizes = dict(length=self.length, context=self.context, user=self.user)
    return user_pairs.with_context(records, tokenizer, **sizes, cut=cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledPreferences(Pairs):
  """Pairs of a `chosen` and a `rejected` completion, each with two `samples` of a policy: four rows.

  The loss of pairs looks at the first two rows.
  """

  @property
  def rows_per_prompt(self) -> int:
    return 4

  @property
  def provides(self) -> frozenset[str]:
    return frozenset({'label', 'uniform'})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    return user_pairs.with_samples(records, tokenizer, length=self.length, cut=cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback(Given):
  """Prompts with one completion and its `label`: true or false, or the probability that it is good."""

  # Records of a batch, one row each.
  rows: AtLeastOne = 32
  # Also score every prompt with the completion of another record: the feature `mismatched_log_ratio`,
  # which costs two further forward passes.
  mismatched: bool = False
  # Numbers that every record has and the objective reads: name of the array -> field of the record.
  numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Names of those arrays whose numbers must be at least 0.
  not_negative: tuple[str, ...] = ()

  def __post_init__(self):
    if self.mismatched and self.rows < 2:
      raise ValueError(
        'rows: mismatched=True takes completions of other rows, so there must be two'
      )

  @property
  def records(self) -> int:
    return self.rows

  @property
  def fields(self) -> tuple[str, ...]:
    return ('completion',)

  @property
  def rows_per_prompt(self) -> int:
    return 1

  @property
  def provides(self) -> frozenset[str]:
    own = ['mismatched_log_ratio'] if self.mismatched else []
    return frozenset({'label', *self.numbers, *own})

  @property
  def lays_apart(self) -> bool:
    return not self.mismatched

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    sizes = dict(length=self.length, mismatched=self.mismatched)
    batch = batching.feedback(records, tokenizer, **sizes, cut=cut)
    settings = dict(rows=1, not_negative=self.not_negative)
    return batch.with_arrays(**pair_fields.numbers(records, self.numbers, **settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(Given):
  """Prompts with several `completions` and their `rewards`: `candidates` rows each."""

  # Records of a batch.
  lists: AtLeastOne = 8
  # Rows of a record; one with fewer completions has empty rows, and one with more is unusable.
  candidates: Annotated[int, Range(at_least=2)] = 4
  # 0 pads rows on the right only; otherwise the number of tokens that prompts are left-padded to, so
  # that the phase can share the prompt of a list (`share_prompts`); see `overlong`.
  prompt_length: Count = 0

  @property
  def records(self) -> int:
    return self.lists

  @property
  def fields(self) -> tuple[str, ...]:
    return ('completions',)

  @property
  def rows_per_prompt(self) -> int:
    return self.candidates

  @property
  def provides(self) -> frozenset[str]:
    return frozenset({'rewards', 'valid', 'uniform'})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    sizes = dict(length=self.length, size=self.candidates, prompt_length=self.prompt_length)
    return batching.lists(records, tokenizer, **sizes, cut=cut)


def _length(batch: Batch) -> float:
  """Mean number of tokens in the mask, of the rows that have one."""
  return float(batch.mask.sum() / max(batch.mask.any(axis=1).sum(), 1))


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
      metrics={'length': _length(batch), **self.meter.take()},
      samples=[],
      messages=[],
    )
