"""Episodes that branch behind replies which made the policy unsure (ARPO, arXiv:2507.19849).

What a tool answers changes what the policy may say next, most where its entropy rises. So some of the
rows of a prompt are not drawn at first. Each of them becomes a copy of an episode: it shares all tokens
up to the end of such a reply, and draws everything behind it anew. Comparing the copies shows which use
of the reply is best.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from polgrad.collect.base import Collect, Context, Draw, Filtering
from polgrad.collect.continuations import Continuer, Prefixes, make_continuer
from polgrad.collect.drawn import Drawn
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.scored import distinct
from polgrad.collect.steps import PROVIDED, Report, Steps, common
from polgrad.environments.episodes import Episode
from polgrad.registry import AtLeastOne, Fraction
from polgrad.types import Batch, TrainState, turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branched(Filtering):
  """Samples episodes, some of which are copies of others up to a turn.

  A part of the rows of a prompt starts at the prompt. Behind every reply, in the order of turns, each
  row is copied while the prompt has rows left, if

      clip(u - entropy_weight (H - H_0), 0, 1) <= threshold

  with u uniform in [0, 1). H is the mean of -log pi of the first `window` tokens of the turn behind the
  reply, divided by the logarithm of the vocabulary, and H_0 that of the first turn of the row: an
  estimate of how much the entropy rose. The copy draws this turn and all later ones anew. Rows that are
  left at the end start at the prompt. Without an environment all rows do.
  """

  # Fraction of the rows of a prompt that start at it, at least one row.
  started: Fraction = 0.5
  # How much a rise of the entropy by the logarithm of the vocabulary changes the probability of a copy.
  entropy_weight: float = 0.2
  # Probability of a copy where the entropy does not change.
  threshold: Fraction = 0.5
  # Tokens of a turn that its entropy is estimated from.
  window: AtLeastOne = 20

  @property
  def first(self) -> int:
    """Rows of a prompt that start at it."""
    return max(1, int(self.started * self.samples_per_prompt))

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED | self.turn_arrays.keys()

  @property
  def keeps_states(self) -> bool:
    return True

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    left = self.samples_per_prompt - self.first
    return BranchedSteps(
      settings=self,
      draw_rows=make_row_sampler(self, context, self.first),
      continuer=make_continuer(self, context, samples=1, prefixes=self.prompts * max(left, 1)),
      **common(self, context, recompute_proximal=self.recompute_proximal),
    ).collect


@dataclasses.dataclass
class Growing:
  """Rows while they are drawn, in the order in which they are."""

  batch: Batch
  episodes: list[Episode]
  prompt: np.ndarray  # i[B], number of the prompt of each row
  anew: np.ndarray  # i[B], the first turn that was drawn for this row
  ids: list[int]  # of the records of prefixes that were continued


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchedSteps(Steps):
  """The steps of `Branched`: rows are copied while they are sampled."""

  settings: Branched
  draw_rows: RowSampler  # of the rows that start at the prompt
  continuer: Continuer  # of copies

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    settings = self.settings
    records = draw(settings.prompts)
    drawn = self.count(self.draw_rows(state, records, step), settings.first)
    rows = Growing(
      batch=drawn.batch,
      episodes=list(drawn.episodes),
      prompt=np.repeat(np.arange(settings.prompts), settings.first),
      anew=np.zeros(len(drawn.batch.tokens), int),
      ids=[],
    )
    random = np.random.default_rng((self.context.seed, step, 5))
    self.complete(rows, random, state, records, step)
    order = np.argsort(rows.prompt, kind='stable')
    batch = jax.tree.map(lambda x: x[order], rows.batch.with_arrays(anew=rows.anew))
    # All copies are drawn, so the states of episodes are not needed any more.
    episodes = [rows.episodes[i].without_states() for i in order if rows.episodes]
    return Drawn(batch, episodes), records

  def complete(
    self,
    rows: Growing,
    random: np.random.Generator,
    state: TrainState,
    records: Sequence[dict],
    step: int,
  ) -> None:
    """Adds copies and further rows, until each prompt has all of its rows."""
    # Turn by turn: a copy may be copied again at a later turn.
    turn = 1
    while turn < max(len(turns(mask)) for mask in rows.batch.mask):
      self._grow(rows, self._copied(rows, turn, random), turn, state, records, step)
      turn += 1
    starts = np.repeat(self.settings.first * np.arange(self.settings.prompts), self._left(rows))
    self._grow(rows, starts, 0, state, records, step)

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    batch, report = super().score(rows, records, state, draw, step)
    features = dict(batch.features)
    anew = features.pop('anew')
    report.metrics['branches/copies'] = float((anew > 0).mean())
    own = [mask[turns(mask)[turn].start :].sum() for mask, turn in zip(batch.mask, anew)]
    report.metrics['branches/tokens'] = float(np.sum(own))
    return batch.replace(features=features), report

  def _left(self, rows: Growing) -> np.ndarray:
    """Rows that each prompt has left."""
    have = np.bincount(rows.prompt, minlength=self.settings.prompts)
    return self.settings.samples_per_prompt - have

  def _copied(self, rows: Growing, turn: int, random: np.random.Generator) -> np.ndarray:
    """The rows that are copied behind the reply before a turn."""
    settings, left = self.settings, self._left(rows)
    scale = np.log(self.context.policy.config.vocab_size)
    found = []
    for row, mask in enumerate(rows.batch.mask):
      spans, prompt = turns(mask), rows.prompt[row]
      # A turn that a copy shares, or begins with, was looked at in the row that it is a copy of.
      if turn >= len(spans) or turn <= rows.anew[row] or not left[prompt]:
        continue
      begin, now = (
        -rows.batch.behavior_logp[row, span][: settings.window].mean() / scale
        for span in (spans[0], spans[turn])
      )
      chance = copy_chance(now - begin, settings.entropy_weight, settings.threshold)
      if random.binomial(1, chance):
        found.append(row)
        left[prompt] -= 1
    return np.array(found, int)

  def _grow(
    self,
    rows: Growing,
    taken: np.ndarray,
    turn: int,
    state: TrainState,
    records: Sequence[dict],
    step: int,
  ) -> None:
    """Adds a row for each that is `taken`, which draws a turn of it and all later ones anew."""
    if not len(taken):
      return
    columns = [turns(rows.batch.mask[row])[turn].start for row in taken]
    ids = rows.batch.prompt_ids[taken]
    prefixes = Prefixes(
      taken.astype(np.int32), np.array(columns, np.int32), distinct(ids, rows.ids)
    )
    own = [records[i] for i in rows.prompt[taken]]
    fresh = self.continuer(
      *(state, rows.batch, prefixes, step, self.meter, own, rows.episodes), anew=turn == 0
    )
    rows.batch = jax.tree.map(lambda x, y: np.concatenate([x, y]), rows.batch, fresh.batch)
    rows.episodes += fresh.episodes
    rows.prompt = np.append(rows.prompt, rows.prompt[taken])
    rows.anew = np.append(rows.anew, np.full(len(taken), turn))
    rows.ids += ids.tolist()


def copy_chance(rise: float, weight: float, threshold: float) -> float:
  """P(clip(u - weight * rise, 0, 1) <= threshold), u uniform in [0, 1): that a row is copied.

  >>> copy_chance(0.0, 0.2, 0.5), copy_chance(1.0, 0.2, 0.5), copy_chance(-9.0, 0.2, 0.5)
  (0.5, 0.7, 0.0)
  """
  return 1.0 if threshold >= 1 else float(np.clip(threshold + weight * rise, 0, 1))
