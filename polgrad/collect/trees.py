"""Rollouts that branch where the policy was least sure: EPTree (TreeRL, arXiv:2506.11902).

Each prompt gets some completions, the first branches of its trees. Then, repeatedly, tokens of each
tree that were drawn with a low probability are drawn again, and completed from there. All completions,
the leaves, are scored; the means of their rewards say how good the nodes between the forks are.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from polgrad.collect.base import Collect, Context, Draw, Filtering
from polgrad.collect.continuations import Continuer, Prefixes, make_continuer
from polgrad.collect.drawn import Drawn
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.scored import distinct
from polgrad.collect.steps import PROVIDED, Report, Steps, common
from polgrad.compiling import jit
from polgrad.losses import trees
from polgrad.registry import AtLeastOne
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState

NODES = trees.TreeValues._fields  # features that are filled in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trees(Filtering):
  """Samples completions of prompts as trees; some of the leaves are trained on.

  A prompt has trees * (1 + iterations * forks * branches) leaves. They are scored and compared with each
  other, and `samples_per_prompt` of them, with the paths that lead to them, are rows of the batch. The
  features `node_values`, `parent_values`, `node_leaves` and `parent_leaves` describe the node of each
  token, see `losses.trees`.
  """

  # Leaves of each prompt that are trained on: drawn at random, among them one with the largest reward.
  samples_per_prompt: AtLeastOne = 16
  # Trees of each prompt.
  trees: AtLeastOne = 6
  # How often the trees are forked.
  iterations: AtLeastOne = 1
  # Tokens of each tree that are forked in an iteration: those with the lowest probability of all its
  # tokens that were not forked yet.
  forks: AtLeastOne = 2
  # New leaves of each fork.
  branches: AtLeastOne = 2

  def __post_init__(self):
    super().__post_init__()
    if self.has_environment:
      raise ValueError(
        'Trees: a token in the middle of a turn is drawn again, which an environment cannot answer; '
        'leave out the environment, or take another method'
      )
    if self.samples_per_prompt > self.leaves:
      raise ValueError(
        f'Trees: samples_per_prompt is {self.samples_per_prompt}, but a prompt has only {self.leaves} '
        f'leaves: {self.trees} trees * (1 + {self.iterations} iterations * {self.forks} forks * '
        f'{self.branches} branches)'
      )

  @property
  def leaves(self) -> int:
    """Leaves of a prompt."""
    return self.trees * (1 + self.iterations * self.forks * self.branches)

  @property
  def provides(self) -> frozenset[str]:
    return PROVIDED | frozenset(NODES)

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    return TreeSteps(
      settings=self,
      draw_rows=make_row_sampler(self, context, self.trees),
      continuer=make_continuer(
        self, context, samples=self.branches, prefixes=self.prompts * self.trees * self.forks
      ),
      values=jit(trees.tree_values),
      **common(self, context, recompute_proximal=self.recompute_proximal),
    ).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeSteps(Steps):
  """The steps of `Trees`: trees are grown, and leaves chosen after they were scored."""

  settings: Trees
  draw_rows: RowSampler  # of the first leaf of each tree
  continuer: Continuer  # of the others
  values: Callable[..., trees.TreeValues]  # compiled

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    settings = self.settings
    records = draw(settings.prompts)
    known = {record['id']: record for record in records}
    batch = self.count(self.draw_rows(state, records, step), settings.trees).batch
    # While trees grow, rows are in the order in which they are drawn: the first leaves of all trees,
    # then those of the first iteration, and so on.
    rows = np.arange(len(batch.tokens))
    batch = batch.with_arrays(drawn_by=np.repeat(rows[:, None], batch.tokens.shape[1], axis=1))
    tree, forked, ids = rows, np.zeros(batch.tokens.shape, bool), []
    for _ in range(settings.iterations):
      prefixes = _forks(batch, tree, forked, settings.forks, ids)
      forked[prefixes.rows, prefixes.columns] = True
      ids += batch.prompt_ids[prefixes.rows].tolist()
      own = [known[i] for i in batch.prompt_ids[prefixes.rows].tolist()]
      fresh = self.continuer(state, batch, prefixes, step, self.meter, own).batch
      batch = _grown(batch, fresh, prefixes, settings.branches)
      tree = np.append(tree, np.repeat(tree[prefixes.rows], settings.branches))
      forked = np.concatenate([forked, np.zeros_like(forked, shape=fresh.tokens.shape)])
    return Drawn(_by_prompt(batch, tree // settings.trees)), records

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    """All leaves are scored; those that are trained on are the rows of the batch."""
    batch, report = super().score(rows, records, state, draw, step)
    settings = self.settings
    random = np.random.default_rng((self.context.seed, step, 4))
    rows = chosen(batch.rewards, batch.valid, settings.leaves, settings.samples_per_prompt, random)
    trained = np.zeros(len(batch.tokens), bool)
    trained[rows] = True
    drawn_by = batch['drawn_by']
    values = self.values(
      *(batch.rewards, batch.group_ids, batch.valid, drawn_by, batch.mask, trained)
    )
    own = batch.mask & (drawn_by == np.arange(len(drawn_by))[:, None])
    report.metrics['trees/tokens'] = float(own.sum())
    report.metrics['trees/shared'] = float(1 - own.sum() / batch.mask.sum())
    batch = batch.replace(features={}).with_arrays(**to_host(values)._asdict())
    terms = {name: x[rows] for name, x in report.terms.items()}
    return jax.tree.map(lambda x: x[rows], batch), report._replace(terms=terms)


def _forks(
  batch: Batch, tree: np.ndarray, forked: np.ndarray, forks: int, drawn: Sequence[int]
) -> Prefixes:
  """The prefixes that end before the least likely tokens of each tree, `forks` for each.

  A token that several rows share is looked at in the row that it was drawn in. A tree with fewer tokens
  is forked at its least likely one again.

  Args:
    batch: rows with `drawn_by`.
    tree: i[B], the number of the tree of each row, from 0.
    forked: bool[B, T], tokens that are left out.
    drawn: ids of the records of prefixes that the step has continued before.
  """
  own = batch.mask & (batch['drawn_by'] == np.arange(len(tree))[:, None])
  logp = np.where(own & ~forked, batch.behavior_logp, np.inf)
  rows, columns = [], []
  for number in range(tree.max() + 1):
    members = np.flatnonzero(tree == number)
    found = logp[members]
    if not np.isfinite(found).any():  # all are forked
      found = np.where(own[members], batch.behavior_logp[members], np.inf)
    order = np.argsort(found, axis=None, kind='stable')[:forks]
    order = np.where(np.isfinite(found.ravel()[order]), order, order[0])
    order = np.pad(order, (0, forks - len(order)), mode='edge')
    rows += members[order // found.shape[1]].tolist()
    columns += (order % found.shape[1]).tolist()
  rows, columns = np.array(rows, np.int32), np.array(columns, np.int32)
  return Prefixes(rows, columns, distinct(batch.prompt_ids[rows], drawn))


def _grown(batch: Batch, fresh: Batch, prefixes: Prefixes, branches: int) -> Batch:
  """The batch with new leaves behind it. Their tokens before the fork were drawn by other rows."""
  before, size = batch['drawn_by'], len(batch.tokens)
  rows, columns = (np.repeat(x, branches) for x in (prefixes.rows, prefixes.columns))
  here = np.arange(before.shape[1])[None]
  numbers = size + np.arange(len(rows))
  drawn_by = np.where(here < columns[:, None], before[rows], numbers[:, None])
  fresh = fresh.with_arrays(drawn_by=drawn_by)
  return jax.tree.map(lambda x, y: np.concatenate([x, y]), batch, fresh)


def _by_prompt(batch: Batch, prompt: np.ndarray) -> Batch:
  """The rows in the order of their prompts i[B], with `drawn_by` in terms of the new order."""
  order = np.argsort(prompt, kind='stable')
  place = np.argsort(order)
  drawn_by = place[batch['drawn_by']].astype(np.int32)
  return jax.tree.map(lambda x: x[order], batch.with_arrays(drawn_by=drawn_by))


def chosen(
  rewards: np.ndarray, valid: np.ndarray, leaves: int, number: int, random: np.random.Generator
) -> np.ndarray:
  """The leaves that are trained on, rows i[N * number]: at random, with at least one of the best.

  Leaves that are not valid are taken only where there are no others.

  Args:
    rewards, valid: [N * leaves].
    leaves: of a prompt.
    number: of leaves of a prompt that are trained on.
  """
  found = []
  for start in range(0, len(rewards), leaves):
    order = start + random.permutation(leaves)
    order = order[np.argsort(~valid[order], kind='stable')]
    scores = np.where(valid[order], rewards[order], -np.inf)
    # The first of the best leaves takes the last place, if it has none.
    best = int(np.argmax(scores))
    if best >= number:
      order[number - 1] = order[best]
    found.append(np.sort(order[:number]))
  return np.concatenate(found)
