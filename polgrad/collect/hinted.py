"""Rollouts of prompts that are asked again with the answer where no sample was right."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polgrad.collect.base import Collect, Context, Draw
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import Rollouts
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.scored import Texts, with_groups
from polgrad.collect.steps import Report
from polgrad.curricula import Sampled
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.registry import AtLeastOne
from polgrad.types import Batch, Prompts, TrainState

PROMPT, ANSWER = '{prompt}', '{answer}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hinted(Rollouts):
  """Rollouts; a prompt without a right sample is asked again with its answer (STaR, arXiv:2203.14465).

  What is drawn with the hint takes the place of the samples, behind the prompt without the hint: it is
  judged and trained as if the policy had found it alone. `behavior_logp` is that with the hint, so no
  ratio should be made of it. The feature `hinted` is 1 for such rows.
  """

  # The prompt that has the hint, or of a conversation its last turn.
  hint: str = '{prompt}\n(The answer is {answer}.)\n'
  # Field of the record with the answer.
  hint_field: str = 'answer'
  # Tokens that the hint adds to a prompt, at most.
  hint_length: AtLeastOne = 64
  # Reward from which a sample is right.
  threshold: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if PROMPT not in self.hint or ANSWER not in self.hint:
      raise ValueError(f'Hinted: hint={self.hint!r} must have {PROMPT} and {ANSWER}')
    others = ('max_resamples', 'beginning', 'lag', 'replay', 'environment')
    self.refuse('a prompt is asked a second time, with a hint', *others)

  def check_texts(self, tokenizer: Tokenizer) -> None:
    super().check_texts(tokenizer)
    words = self.hint.replace(PROMPT, '').replace(ANSWER, '')
    batching.check_text('hint', words, tokenizer)

  @classmethod
  def longest_prompt(
    cls, length: int, new: int, chat: bool, asked: Mapping[str, Any], *, sampled: bool = False
  ) -> int:
    before = super().longest_prompt(length, new, chat, asked, sampled=sampled)
    return before + (asked.get('hint_length', cls.hint_length) if sampled else 0)

  def _shapes(self) -> dict[str, tuple]:
    return super()._shapes() | {'hinted': (np.float32,)}

  @property
  def with_hint(self) -> 'Hinted':
    """The same collector with room for the hint."""
    return dataclasses.replace(self, prompt_length=self.prompt_length + self.hint_length)

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    hints = [hinted(record, self.hint, self.hint_field) for record in records]
    own = self.own(tokenizer)
    batching.prompts(hints, own, length=self.prompt_length + self.hint_length, cut=cut)
    return super().lay_out(records, tokenizer=tokenizer, cut=cut)

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    other = context._replace(seed=~context.seed)  # other noise than that of the first try
    again = make_row_sampler(self.with_hint, other, self.samples_per_prompt, self.behavior_policy)
    return self.collected_by(HintedSteps(**self._parts(context), draw_hinted=again))


def hinted(record: Mapping, hint: str, field: str) -> dict:
  """The record whose prompt, or last turn, has the hint.

  Raises:
    ValueError: the record has no answer; names it.
  """
  answer = record.get(field)
  if not isinstance(answer, str) or not answer:
    raise ValueError(
      f'record {record["id"]}: no text {field!r} for the hint, only {sorted(record)}'
    )
  # In one pass, so that marks within the prompt or the answer are left alone.
  marks = re.compile('|'.join(map(re.escape, (PROMPT, ANSWER))))
  fill = lambda text: marks.sub(lambda found: text if found[0] == PROMPT else answer, hint)
  if 'messages' not in record:
    return {**record, 'prompt': fill(record['prompt'])}
  *before, last = record['messages']
  return {**record, 'messages': [*before, {**last, 'content': fill(last['content'])}]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HintedSteps(RolloutSteps):
  """The steps of `Hinted`."""

  settings: Hinted
  draw_hinted: RowSampler

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    batch, report = super().score(rows, records, state, draw, step)
    report.metrics['hinted'] = float(batch['hinted'].mean())
    return batch, report

  def _scored(self, rows: Drawn, records: Sequence[dict]) -> tuple[Batch, Texts]:
    batch, texts = super()._scored(rows, records)
    return batch.with_arrays(hinted=np.zeros(len(batch.tokens), np.float32)), texts

  def _resample(
    self, batch: Batch, texts: Texts, state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Texts, Sampled]:
    """Asks prompts again whose samples are all wrong."""
    batch, texts, sampled = super()._resample(batch, texts, state, draw, step)
    settings, size = self.settings, self.settings.samples_per_prompt
    right = batch.valid & (batch.rewards >= settings.threshold)
    wrong = ~right.reshape(-1, size).any(axis=1)
    if not wrong.any():
      return batch, texts, sampled
    hints = [hinted(one, settings.hint, settings.hint_field) for one in texts.records]
    rows = self._draw(self.draw_hinted, state, hints, step)
    plain = without_hint(rows.batch, batch, settings.prompt_length, settings.hint_length)
    again, told = self._judge(Drawn(plain), texts.records)
    again = again.with_arrays(hinted=np.ones(len(again.tokens), np.float32))
    places = np.arange(len(wrong))
    source = np.where(wrong, len(wrong) + places, places)
    return *with_groups((batch, texts), (again, told), source, size), sampled


def without_hint(drawn: Batch, first: Batch, prompt_length: int, hint_length: int) -> Batch:
  """Completions that were drawn with the hint, behind the prompts of the first try.

  Args:
    drawn: rows with `hint_length` more columns of the prompt.
    first: rows of the same prompts without the hint.
  """

  def put(name: str) -> Any:
    own, other = first[name], drawn[name]
    return np.concatenate([own[:, :prompt_length], other[:, prompt_length + hint_length :]], axis=1)

  names = ('tokens', 'segment_ids', 'mask', 'behavior_logp')
  plain = {name: put(name) for name in names}
  return drawn.replace(prompt_ids=first.prompt_ids, group_ids=first.group_ids, **plain)
