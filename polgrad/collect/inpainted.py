"""Rollouts that begin with a part of the solution where all of a prompt's were wrong (IGPO)."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polgrad.collect.base import Collect, Context, Draw, Filtering
from polgrad.collect.continuations import Continuer, Prefixes, make_continuer
from polgrad.collect.drawn import Drawn
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.scored import demonstrated, distinct, score_rows
from polgrad.collect.steps import PROVIDED, Report, Steps, common
from polgrad.data import batching, chunks
from polgrad.data.tokenizers import Tokenizer
from polgrad.registry import AtLeastOne, Count, Fraction
from polgrad.types import Batch, Prompts, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpainted(Filtering):
  """Rollouts; in groups without a right row some rows are replaced by right ones that began with a hint.

  For each attempt eta is drawn from [least, most], the record's `answer` is cut into chunks, and the
  completion begins with that fraction of them. The policy draws the rest. Of the attempts that are
  right, some take the places of wrong rows of the group, at random. Their given tokens are in the mask,
  and the feature `injected` is 1 for them, so a loss can treat them differently. They were not sampled:
  `behavior_logp` and `proximal_logp` of them are those of the policy when the batch is used.

  The attempts of a step cost up to `attempts` further completions for each group without a right row. A
  curriculum learns of the policy's own rows alone.
  """

  # Log-probs of given tokens can only come from the trainer, so this must be True.
  recompute_proximal: bool = True
  # Least and largest fraction of the chunks of the answer that is given, eta.
  least: Fraction = 0.2
  most: Fraction = 0.6
  # Least and largest number of tokens of a chunk, drawn uniformly.
  shortest: AtLeastOne = 5
  longest: AtLeastOne = 10
  # Attempts with a hint for each group without a right row; 0: as many as it has rows.
  attempts: Count = 0
  # Largest number of rows that are replaced, as a fraction of the group.
  replaced: Fraction = 0.5
  # Least reward of a right row.
  right: float = 1.0
  # Attempts that are drawn in one call of the sampler, a multiple of the devices; 0: as many as a batch
  # has rows.
  attempts_at_a_time: Count = 0

  def __post_init__(self):
    super().__post_init__()
    if self.has_environment:
      raise ValueError('Inpainted: a hint is the beginning of one turn; leave out the environment')
    for low, high in (('least', 'most'), ('shortest', 'longest')):
      if getattr(self, low) > getattr(self, high):
        raise ValueError(
          f'Inpainted: {low}={getattr(self, low)} is above {high}={getattr(self, high)}'
        )
    if not self.recompute_proximal:
      raise ValueError(
        'Inpainted: recompute_proximal must be True, because given tokens have no log-prob of a sampler'
      )

  @property
  def fields(self) -> tuple[str, ...]:
    return ('answer',)

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED | {'injected'}

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Prompts:
    for record in records:
      batching.completion(record, self.own(tokenizer))  # refuses a record without an answer
    return super().lay_out(records, tokenizer=tokenizer, cut=cut)

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    return InpaintedSteps(
      settings=self,
      draw_rows=make_row_sampler(self, context, self.samples_per_prompt),
      continuer=make_continuer(
        self, context, samples=1, prefixes=self.attempts_at_a_time or self.rows
      ),
      **common(self, context, recompute_proximal=True),
    ).collect


class Replaced(NamedTuple):
  """Which rows of a batch are replaced, and by which attempts; both [n]."""

  rows: np.ndarray
  attempts: np.ndarray


def hint_length(cuts: Sequence[slice], fraction: float) -> int:
  """Tokens of the first round(fraction * n) of n chunks, and at least one token fewer than all.

  >>> cuts = [slice(0, 5), slice(5, 11), slice(11, 16), slice(16, 23), slice(23, 28)]
  >>> [hint_length(cuts, fraction) for fraction in (0.0, 0.2, 0.5, 0.6, 1.0)]
  [0, 5, 11, 16, 27]
  """
  number = int(np.rint(fraction * len(cuts)))
  return min(cuts[number - 1].stop, cuts[-1].stop - 1) if number and cuts else 0


def hopeless(rewards: np.ndarray, valid: np.ndarray, right: float) -> np.ndarray:
  """bool[N]: groups that have valid rows, none of which has a reward of at least `right`.

  Args:
    rewards: f[N, G].
    valid: bool[N, G].
    right: least reward of a right row.
  """
  return valid.any(axis=1) & ~(valid & (rewards >= right)).any(axis=1)


def replacements(
  groups: np.ndarray, correct: np.ndarray, size: int, most: int, random: np.random.Generator
) -> Replaced:
  """Rows of groups at random, as many as there are correct attempts, and at most `most` of each group.

  Args:
    groups: i[n], numbers of groups of `size` consecutive rows.
    correct: bool[n, K], attempts of each of them.
    size: rows of a group.
    most: rows of a group that are replaced at most, taking the first correct attempts.
    random: decides which rows.
  """
  rows, attempts = [], []
  for number, (group, found) in enumerate(zip(groups, correct)):
    taken = np.flatnonzero(found)[: min(most, size)]
    rows += (group * size + random.permutation(size)[: len(taken)]).tolist()
    attempts += (number * correct.shape[1] + taken).tolist()
  return Replaced(np.array(rows, int), np.array(attempts, int))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintedSteps(Steps):
  """The steps of `Inpainted`: attempts with hints are drawn after the group was scored."""

  settings: Inpainted
  draw_rows: RowSampler
  continuer: Continuer

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    records = draw(self.settings.prompts)
    rows = self.draw_rows(state, records, step)
    return self.count(rows, self.settings.samples_per_prompt), records

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    settings, size = self.settings, self.settings.samples_per_prompt
    batch, report = super().score(rows, records, state, draw, step)
    batch = batch.with_arrays(injected=np.zeros(batch.mask.shape, np.float32))
    shaped = (x.reshape(-1, size) for x in (batch.rewards, batch.valid))
    groups = np.flatnonzero(hopeless(*shaped, settings.right))
    report.metrics['hints/hopeless'] = len(groups) / len(records)
    if not len(groups):
      report.metrics.update({'hints/rescued': 0.0, 'hints/rows': 0.0})
      return batch, report
    random = np.random.default_rng((self.context.seed, step, 8))
    own = [records[g] for g in groups]
    found, terms = self._attempts(own, state, step, random)
    correct = (found.valid & (found.rewards >= settings.right)).reshape(len(groups), -1)
    most = int(np.rint(settings.replaced * size))
    taken = replacements(groups, correct, size, most, random)

    def put(old, new):
      old = old.copy()
      old[taken.rows] = new[taken.attempts]
      return old

    changed = {name: put(batch[name], found[name]) for name in batch if name != 'group_ids'}
    report = report.beside('hinted', found, terms)._replace(
      terms={name: put(x, terms.components[name]) for name, x in report.terms.items()}
    )
    report.metrics['hints/rescued'] = float(correct.any(axis=1).sum() / len(records))
    report.metrics['hints/rows'] = len(taken.rows) / len(batch.tokens)
    return batch.with_arrays(**changed), report

  def _attempts(
    self, records: Sequence[dict], state: TrainState, step: int, random: np.random.Generator
  ) -> tuple[Batch, object]:
    """Scored rows of the records that begin with a part of their answer, record-major."""
    settings, tokenizer = self.settings, self.context.tokenizer
    sizes = dict(prompt_length=settings.prompt_length, max_new_tokens=settings.max_new_tokens)
    # A long answer loses its end, which no hint shows.
    given = demonstrated(records, tokenizer, **sizes, cut=True)
    number = settings.attempts or settings.samples_per_prompt
    lengths = [self._hint(int(n), random) for n in given.mask.sum(axis=1) for _ in range(number)]
    rows = np.repeat(np.arange(len(records)), number).astype(np.int32)
    columns = np.array(lengths, np.int32) + settings.prompt_length
    prefixes = Prefixes(rows, columns, distinct(given.prompt_ids[rows]))
    drawn = self._continued(given, prefixes, records, state, step)
    here = np.arange(given.mask.shape[1])[None]
    injected = drawn.mask & (here < columns[:, None])
    batch, texts = score_rows(Drawn(drawn), records, self.context)
    return batch.with_arrays(injected=injected.astype(np.float32)), texts.scores

  def _hint(self, tokens: int, random: np.random.Generator) -> int:
    """Tokens of a hint of an answer with this number of tokens."""
    settings = self.settings
    cuts = chunks.random(tokens, random, shortest=settings.shortest, longest=settings.longest)
    return hint_length(cuts, random.uniform(settings.least, settings.most))

  def _continued(
    self,
    given: Batch,
    prefixes: Prefixes,
    records: Sequence[dict],
    state: TrainState,
    step: int,
  ) -> Batch:
    """The prefixes with what the policy draws behind them, some in each call of the sampler."""
    at_a_time, parts = self.continuer.prefixes, []
    for first in range(0, len(prefixes.rows), at_a_time):
      some = prefixes.taken(slice(first, first + at_a_time))
      own = [records[row] for row in some.rows]
      parts.append(self.continuer(state, given, some, step, self.meter, own).batch)
    names = ('tokens', 'segment_ids', 'mask', 'behavior_logp', 'finished', 'prompt_ids')
    joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Batch(**joined, group_ids=given.group_ids[prefixes.rows])

  def credit(self, batch: Batch, state: TrainState) -> tuple[Batch, object]:
    # Given tokens were not sampled: their ratio to the sampler is 1.
    injected = batch['injected'] > 0
    own = np.where(injected, batch.proximal_logp, batch.behavior_logp)
    return super().credit(batch.replace(behavior_logp=own), state)
