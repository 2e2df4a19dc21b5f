"""Episodes that are searched for: the states that the policy reached most surely are expanded first.

A state is what the policy has read and said up to the beginning of a turn, and an action is a turn. To
expand a state is to draw several turns from it and to have the environment answer each. So a search
returns to a state before a mistake, and finds proofs that single samples do not find
(BFS-Prover, arXiv:2502.03438).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polgrad.collect.base import Collect, Context, Draw, Filtering
from polgrad.collect.continuations import Continuer, Prefixes, make_continuer
from polgrad.collect.drawn import Drawn
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.scored import distinct
from polgrad.collect.steps import PROVIDED, Report, Steps, common
from polgrad.environments.episodes import Episode
from polgrad.registry import AtLeastOne, NotNegative, unbound
from polgrad.sampling import behavior_policies
from polgrad.types import Batch, TrainState, turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFirst(Filtering):
  """Searches for episodes of a high reward, best first.

  The state in which a prompt begins is expanded first, by `samples_per_prompt` actions. Then the open
  states with the largest

      sum_{t < L} log pi(a_t | s_t) / L^alpha

  are, L being the turns of a state; log pi of an action is the sum over its tokens. The search of a
  prompt ends when an episode is over with a reward of the environment above `solved`, or after
  `expansions`.
  An action that was drawn twice from a state, and an action that leads to a state that the prompt has
  been in, open no state.

  `samples_per_prompt` of what was drawn are the rows of a prompt: episodes that solve it, those with the
  fewest turns first, and then others. A turn that several of these rows share is in the mask of the
  first one alone, so each pair of state and action is learned once. Without an environment all rows are
  single turns, and nothing is searched.
  """

  # States of each prompt that are expanded, at most; the first state is one of them.
  expansions: AtLeastOne = 16
  # States of each prompt that are expanded together, in one call of the sampler.
  at_once: AtLeastOne = 4
  # Exponent of the length: 0 prefers short paths, 1 compares mean log-likelihoods of actions.
  alpha: NotNegative = 0.5
  # Reward of the environment above which an episode solves its prompt.
  solved: float = 0.5
  # Who acts.
  behavior_policy: behavior_policies.Part = behavior_policies.current

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED | self.turn_arrays.keys()

  @property
  def keeps_states(self) -> bool:
    return True

  @property
  def anchors_read(self) -> frozenset[str]:
    own = {*behavior_policies.models_read(self.behavior_policy)} - {'policy'}
    return super().anchors_read | frozenset(own)

  @property
  def filtered(self) -> bool:
    mixed = unbound(self.behavior_policy) is not behavior_policies.current
    return super().filtered or (mixed and not self.recompute_proximal)

  def make(self, context: Context) -> Collect:
    context, size = self.within(context), self.samples_per_prompt
    rows = make_row_sampler(self, context, size, self.behavior_policy)
    further = make_continuer(
      self,
      context,
      samples=size,
      prefixes=self.prompts * self.at_once,
      behavior_policy=self.behavior_policy,
    )
    single = lambda one: dataclasses.replace(one, draw=functools.partial(one.draw, single=True))
    if self.has_environment:
      rows, further = single(rows), single(further)
    return BestFirstSteps(
      settings=self,
      draw_rows=rows,
      continuer=further,
      **common(self, context, recompute_proximal=self.recompute_proximal),
    ).collect


class Node(NamedTuple):
  """A state: the beginning of the next turn of a drawn row."""

  priority: float
  row: int
  column: int  # where the next turn begins


def priority(logp: float, length: int, alpha: float) -> float:
  """How soon a state is expanded, logp / length^alpha; the larger, the sooner.

  >>> priority(-6.0, 4, 0.5), priority(-6.0, 4, 0.0)
  (-3.0, -6.0)
  """
  return logp / length**alpha


def with_replies(batch: Batch, read: Sequence[list[int] | None]) -> tuple[Batch, np.ndarray]:
  """The rows (NumPy) with what they read next, outside the mask, and where their next turn begins.

  Returns:
    The batch, and columns i[B]; -1 where a row is over or has no room for another token.
  """
  tokens, segments = batch.tokens.copy(), batch.segment_ids.copy()
  width = tokens.shape[1]
  columns = np.full(len(tokens), -1)
  for row, ids in enumerate(read):
    end = width - int(np.argmax(segments[row, ::-1] > 0))
    if ids is None or end + len(ids) >= width:
      continue
    tokens[row, end : end + len(ids)], segments[row, end : end + len(ids)] = ids, 1
    columns[row] = end + len(ids)
  return batch.replace(tokens=tokens, segment_ids=segments), columns


class Search:
  """The searches of all prompts of a step, on the host: which states are open, and what was drawn.

  Args:
    settings: of the collector.
    prompts: number of prompts.
  """

  def __init__(self, settings: BestFirst, prompts: int):
    self.settings = settings
    self.batch: Batch | None = None
    self.episodes: list[Episode] = []
    self.prompt: list[int] = []  # of each row
    self.solves: list[bool] = []  # of each row
    # Of each row: whether its last action was drawn before, from the same state.
    self.repeated: list[bool] = []
    self.turns: list[int] = []  # of each row
    self.left = [settings.expansions - 1] * prompts
    self._open: list[list[Node]] = [[] for _ in range(prompts)]
    self._paths: set[Any] = set()  # (prompt, tokens up to the end of the last turn)
    self._states: set[Any] = set()  # (prompt, state)

  def add(self, drawn: Drawn, prompts: Sequence[int]) -> None:
    """Adds rows that were drawn, and opens the states that they lead to."""
    batch, columns = with_replies(drawn.batch, drawn.read or [None] * len(prompts))
    first = len(self.prompt)
    for i, prompt in enumerate(prompts):
      spans = turns(batch.mask[i])
      path = prompt, _until(batch, i, spans[-1].stop)
      episode = drawn.episodes[i] if drawn.episodes else None
      again = path in self._paths
      self._paths.add(path)
      self.prompt.append(prompt)
      self.turns.append(len(spans))
      self.repeated.append(again)
      self.solves.append(bool(episode and self._solves(episode)))
      if columns[i] < 0 or again or not episode.valid or self._reached(prompt, episode):
        continue
      logp = float(batch.behavior_logp[i][batch.mask[i]].sum())
      node = Node(priority(logp, len(spans), self.settings.alpha), first + i, int(columns[i]))
      self._open[prompt].append(node)
    self.episodes += drawn.episodes
    join = lambda x, y: np.concatenate([x, y])
    self.batch = batch if self.batch is None else jax.tree.map(join, self.batch, batch)

  def take(self) -> list[Node]:
    """The states that are expanded next, of all prompts; they are open no more."""
    solved = {p for p, good in zip(self.prompt, self.solves) if good}
    found = []
    for prompt, nodes in enumerate(self._open):
      number = 0 if prompt in solved else min(self.settings.at_once, self.left[prompt])
      nodes.sort(key=lambda node: -node.priority)  # stable: of equal ones the oldest is the first
      found += nodes[:number]
      self.left[prompt] -= len(nodes[:number])
      del nodes[:number]
    return found

  def chosen(self) -> np.ndarray:
    """The rows that are kept, i[N * samples_per_prompt], prompt-major."""
    found = []
    for prompt in range(len(self.left)):
      rows = [row for row, owner in enumerate(self.prompt) if owner == prompt]
      # Of equal rows the last drawn is the first: it is the longest one of those that solve nothing.
      rank = lambda row: (
        self.repeated[row],
        not self.solves[row],
        self.turns[row] if self.solves[row] else -row,
      )
      found += sorted(rows, key=rank)[: self.settings.samples_per_prompt]
    return np.array(found, int)

  def _solves(self, episode: Episode) -> bool:
    return episode.valid and episode.done and sum(episode.rewards) > self.settings.solved

  def _reached(self, prompt: int, episode: Episode) -> bool:
    """Whether the prompt has been in the last state of the episode before; notes it.

    States that do not travel between processes are compared where they can be hashed.
    """
    try:
      key = prompt, episode.states[-1]
      before = key in self._states
      self._states.add(key)
    except TypeError:
      return False
    return before


def _until(batch: Batch, row: int, column: int) -> bytes:
  """The tokens of a row before a column, as a key."""
  seen = batch.segment_ids[row, :column] > 0
  return batch.tokens[row, :column][seen].tobytes()


def once(batch: Batch, group: Sequence[int]) -> np.ndarray:
  """The mask bool[B, T] without turns that an earlier row of the same group has taken in the same state.

  Args:
    group: number of the group of each row.
  """
  mask, seen = batch.mask.copy(), set()
  for row, number in enumerate(group):
    for span in turns(batch.mask[row]):
      key = number, _until(batch, row, span.stop)
      if key in seen:
        mask[row, span] = False
      seen.add(key)
  return mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFirstSteps(Steps):
  """The steps of `BestFirst`."""

  settings: BestFirst
  draw_rows: RowSampler  # of the first states
  continuer: Continuer  # of later ones

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    settings = self.settings
    records = draw(settings.prompts)
    search = Search(settings, settings.prompts)
    size = settings.samples_per_prompt
    drawn = self.count(self.draw_rows(state, records, step), size)
    search.add(drawn, np.repeat(np.arange(settings.prompts), size).tolist())
    ids: list[int] = []  # of the records of states that were expanded
    while nodes := search.take():
      rows = np.array([node.row for node in nodes], np.int32)
      columns = np.array([node.column for node in nodes], np.int32)
      own = search.batch.prompt_ids[rows]
      prefixes = Prefixes(rows, columns, distinct(own, ids))
      ids += own.tolist()
      prompts = [search.prompt[row] for row in rows]
      fresh = self.continuer(
        *(state, search.batch, prefixes, step, self.meter),
        [records[prompt] for prompt in prompts],
        search.episodes,
      )
      search.add(fresh, np.repeat(prompts, size).tolist())
    rows = search.chosen()
    solved = {prompt for prompt, good in zip(search.prompt, search.solves) if good}
    drawn_of = np.bincount(search.prompt, minlength=settings.prompts)
    found = {
      'search/solved': len(solved) / settings.prompts,
      'search/expanded': float(drawn_of.mean()) / size,
      'search/repeated': float(np.mean(search.repeated)),
    }
    batch = jax.tree.map(lambda x: x[rows], search.batch)
    batch = batch.with_arrays(**{k: np.full(len(rows), x, np.float32) for k, x in found.items()})
    # All states are expanded, so episodes need theirs no more.
    episodes = [search.episodes[row].without_states() for row in rows if search.episodes]
    return Drawn(batch, episodes), records

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    batch, report = super().score(rows, records, state, draw, step)
    features = dict(batch.features)
    names = [name for name in features if name.startswith('search/')]
    report.metrics.update({name: float(features.pop(name)[0]) for name in names})
    group = np.arange(len(batch.tokens)) // self.settings.samples_per_prompt
    mask = once(batch, group.tolist())
    report.metrics['search/shared'] = float(1 - mask.sum() / max(batch.mask.sum(), 1))
    return batch.replace(mask=mask, features=features), report
