"""Further completions of the first tokens of rows: what `Vines` and `Trees` draw.

A prefix is a row and a column: the tokens of the row before the column are given, and the sampler reads
them as a longer prompt. What it draws is put behind them, so the result is a row like any other, with
the same columns and the same budget of tokens. Nothing is tokenised again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from polgrad import speed
from polgrad.collect.base import Context, Sampling, draws_of
from polgrad.collect.drawn import Begun, Drawn, Draws, with_turns
from polgrad.environments.episodes import Episode
from polgrad.learner import parameter_sets
from polgrad.sampling import behavior_policies
from polgrad.types import Batch, Layout, Prompts, TrainState, turns


class Prefixes(NamedTuple):
  """Prefixes of rows of a batch; one with `n` of them has all its arrays [n]."""

  rows: np.ndarray  # i32, rows of the batch
  columns: np.ndarray  # i32, the first column that is drawn anew
  ids: np.ndarray  # i32, all different within a step: noise is folded from them

  def taken(self, index: Sequence[int]) -> 'Prefixes':
    return Prefixes(*(x[index] for x in self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuer:
  """Draws `samples` completions of each of a fixed number of prefixes."""

  context: Context
  draw: Draws
  reads: Sequence[str]  # parameter sets of the behavior policy
  samples: int
  prefixes: int  # of one call of the sampler

  def __call__(
    self,
    state: TrainState,
    batch: Batch,
    prefixes: Prefixes,
    step: int,
    meter: speed.Meter,
    records: Sequence[dict],
    episodes: Sequence[Episode] = (),
    anew: bool = False,
  ) -> Drawn:
    """Rows of the prefixes, NumPy, prefix-major, and their episodes.

    Args:
      batch: the rows that the prefixes are of, NumPy.
      prefixes: at most as many as a call of the sampler has. It is filled up with rows that are not
        used, so that one shape compiles. With an environment they end where a turn begins.
      step: noise is folded from it.
      meter: of the phase.
      records: of the prompts of the prefixes.
      episodes: of the rows of the batch, with their states, if there is an environment.
      anew: whether prefixes are prompts whose episodes begin anew, with other seeds.
    """
    count = len(prefixes.rows)
    index = np.minimum(np.arange(self.prefixes), count - 1)
    filled = prefixes.taken(index)
    params = parameter_sets(state, self.context.frozen)
    more = {'begun': _begun(batch, filled, episodes)} if episodes and not anew else {}
    with meter.timing('rollout'):
      found = self.draw(
        {name: params[name] for name in self.reads},
        as_prompts(batch, filled, self.context.tokenizer.pad_id),
        [records[i] for i in index],
        filled.ids,
        # A seed that no phase has: the rows that the prefixes are of drew other noise.
        seed=~self.context.seed,
        step=step,
        **more,
      )
      layout = Layout(batch.tokens.shape[1], self.samples)
      meter.add('rollout', speed.forward_flops(self.context.policy.config, found.batch, layout))
    drawn = jax.tree.map(lambda x: x[: count * self.samples], found.batch)
    rows = grafted(batch, prefixes, drawn, self.samples)
    continued = found.episodes[: count * self.samples]
    rows = with_turns(rows, continued) if episodes else rows
    return Drawn(rows, continued, found.read[: count * self.samples])


def make_continuer(
  settings: Sampling,
  context: Context,
  *,
  samples: int,
  prefixes: int,
  behavior_policy: Callable = behavior_policies.current,
) -> Continuer:
  """The `Continuer` of a collector; with an environment, its episodes must keep their states."""
  return Continuer(
    context=context,
    draw=draws_of(settings, context, samples_per_prompt=samples, behavior_policy=behavior_policy),
    reads=(*behavior_policies.models_read(behavior_policy), *settings.drafts),
    samples=samples,
    prefixes=prefixes,
  )


def _begun(batch: Batch, prefixes: Prefixes, episodes: Sequence[Episode]) -> Begun:
  """The episodes that prefixes are the beginnings of."""
  ends = [[span.stop for span in turns(mask)] for mask in batch.mask]
  numbers = [int(np.sum(np.array(ends[r]) <= c)) for r, c in zip(prefixes.rows, prefixes.columns)]
  return Begun(
    episodes=[(episodes[row], number) for row, number in zip(prefixes.rows, numbers)],
    room=(batch.tokens.shape[1] - prefixes.columns).tolist(),
  )


def as_prompts(batch: Batch, prefixes: Prefixes, pad_id: int) -> Prompts:
  """The prefixes as prompts, left-padded to the length of a row."""
  width = batch.tokens.shape[1]
  source = np.arange(width)[None] - (width - prefixes.columns[:, None])
  pick = lambda x: np.take_along_axis(x[prefixes.rows], np.maximum(source, 0), axis=1)
  mask = (source >= 0) & (pick(batch.segment_ids) > 0)
  tokens = np.where(mask, pick(batch.tokens), pad_id).astype(np.int32)
  return Prompts(tokens=tokens, mask=mask, ids=batch.prompt_ids[prefixes.rows])


def grafted(batch: Batch, prefixes: Prefixes, drawn: Batch, samples: int) -> Batch:
  """Rows of the prefixes with what was drawn behind them, in the columns of `batch`.

  What has no room, because a row may have no more than its columns, is cut off; that row is not
  `finished`.

  Args:
    batch: the rows that the prefixes are of.
    prefixes: n of them.
    drawn: n * samples rows, prefix-major, of T + max_new_tokens columns; prefixes end at column T.
    samples: rows of each prefix.
  """
  width = batch.tokens.shape[1]
  rows = np.repeat(prefixes.rows, samples)
  columns = np.repeat(prefixes.columns, samples)[:, None]
  here = np.arange(width)[None]
  # Column c of a row comes from the batch before the fork, and from what was drawn behind it.
  source = np.clip(width + here - columns, 0, drawn.tokens.shape[1] - 1)

  def join(name):
    fresh = np.take_along_axis(drawn[name], source, axis=1)
    return np.where(here < columns, batch[name][rows], fresh)

  fits = (drawn.segment_ids[:, width:] > 0).sum(axis=1) <= width - columns[:, 0]
  return Batch(
    **{name: join(name) for name in ('tokens', 'segment_ids', 'mask', 'behavior_logp')},
    finished=drawn.finished & fits,
    prompt_ids=batch.prompt_ids[rows],
    group_ids=batch.group_ids[rows],
  )
