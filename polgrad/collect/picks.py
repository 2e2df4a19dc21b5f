"""Which rows of each group are trained on: pairs, the best of n, rejection sampling.

A function of `TABLE` fills the setting `choose` of `Rollouts`. It runs on the host before the log-probs
of anchors are computed, so a row that is not trained on is sampled and scored but never forwarded. The
names of its positional arguments say what it reads of `N` groups of `G` rows, as they were sampled and
scored:

| name | array |
|---|---|
| `rewards` | f[N, G], 0 where not valid |
| `valid` | bool[N, G] |
| `wins` | f[N, G, G], probability that a row beats another, if the collector compares |
| `lengths` | i[N, G], tokens of the completion |
| `texts` | object[N, G], the completion as verifiers see it |
| `random` | `numpy.random.Generator` of the step |

It returns `Chosen`: the same number of rows for every group, so shapes do not depend on the data. A row
may be in it more than once. A pair is two consecutive rows. Credit says which of them is preferred, and
how surely (`credit.preference`, `credit.compared`); otherwise the order of the rows does.
"""

import re
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import numpy as np

from polgrad.credit.base import mean_wins
from polgrad.registry import AtLeastOne, Count, Fraction, NotNegative, Positive, Range, call, table

Array = np.ndarray
Gap = Annotated[float, Range(at_least=0)]  # may be infinite


class Chosen(NamedTuple):
  """Rows by their place in the group."""

  rows: Array  # i[N, n], in 0..G-1
  usable: Array  # bool[N, n], False: the row is there for the shape alone, and is masked out


def everything(valid: Array) -> Chosen:
  """All rows, in their order."""
  return Chosen(np.tile(np.arange(valid.shape[1]), (len(valid), 1)), np.ones(valid.shape, bool))


def best_worst(
  rewards: Array,
  valid: Array,
  lengths: Array,
  *,
  min_gap: Gap = 0.0,
  max_gap: Gap = float('inf'),
  length_penalty: NotNegative = 0.0,
) -> Chosen:
  """The rows with the largest and the smallest reward, the better one first.

  Args:
    rewards, valid, lengths: see above.
    min_gap: a pair whose rewards differ by less is left out.
    max_gap: a pair whose rewards differ by this or more is left out: with the same number as `min_gap`
      of another phase, data are split into easy and hard pairs.
    length_penalty: reward that a token costs while rows are chosen; gaps are those of the rewards.

  Raises:
    ValueError: no pair can be between the gaps.
  """
  if not min_gap < max_gap:
    raise ValueError(f'best_worst: min_gap={min_gap} must be below max_gap={max_gap}')
  order = _descending(rewards - length_penalty * lengths, valid)
  return _pairs(order[:, :1], _last(order, valid), valid, rewards, min_gap, max_gap)


def best_second(rewards: Array, valid: Array, *, min_gap: Gap = 0.0) -> Chosen:
  """The rows with the two largest rewards, the better one first."""
  order = _descending(rewards, valid)
  return _pairs(order[:, :1], order[:, 1:2], valid, rewards, min_gap)


def best_random(rewards: Array, valid: Array, random: np.random.Generator) -> Chosen:
  """The row with the largest reward, and one of the others at random."""
  order = _descending(rewards, valid)
  return _pairs(order[:, :1], _shuffled(order[:, 1:], valid, random)[:, :1], valid)


def random_pair(valid: Array, random: np.random.Generator) -> Chosen:
  """Two rows at random, in random order."""
  order = _shuffled(everything(valid).rows, valid, random)
  return _pairs(order[:, :1], order[:, 1:2], valid)


def all_pairs(rewards: Array, valid: Array, *, min_gap: Gap = 0.0) -> Chosen:
  """Every pair of rows of the group, G (G - 1) / 2 pairs; each row is in G - 1 of them."""
  first, second = (np.tile(x, (len(valid), 1)) for x in np.triu_indices(valid.shape[1], 1))
  return _pairs(first, second, valid, rewards, min_gap)


def best_worst_by_wins(
  wins: Array, valid: Array, *, min_gap: Gap = 0.0, second: bool = False
) -> Chosen:
  """The rows that win most and least against the others of their group, the better one first.

  Args:
    wins, valid: see above.
    min_gap: a pair whose mean probabilities to win differ by less is left out.
    second: take the second best in the place of the worst, as the code of COMAL does
      (arXiv:2410.23223).
  """
  rate = mean_wins(wins, valid, xp=np)
  order = _descending(rate, valid)
  other = order[:, 1:2] if second else _last(order, valid)
  return _pairs(order[:, :1], other, valid, rate, min_gap)


def tournament(wins: Array, valid: Array) -> Chosen:
  """The winner and the loser of a knock-out tournament, left out unless the winner beats the loser.

  Rows are paired in their order. Winners play winners, and losers losers, until one is left of each
  (INPO, arXiv:2407.00617). A row without a partner advances without a game. In a tie the first row wins.
  Rows that are not valid do not play.
  """
  rows, usable = np.zeros((len(valid), 2), int), np.zeros((len(valid), 2), bool)
  for group, (game, able) in enumerate(zip(wins, valid)):
    players = np.flatnonzero(able).tolist()
    if len(players) < 2:
      continue
    upper, lower = _halves(game, players)
    while len(upper) > 1:
      upper = _halves(game, upper)[0]
    while len(lower) > 1:
      lower = _halves(game, lower)[1]
    rows[group] = upper[0], lower[0]
    usable[group] = upper != lower and game[upper[0], lower[0]] > 0.5
  return Chosen(rows, usable)


def rejection(
  rewards: Array,
  valid: Array,
  random: np.random.Generator,
  *,
  beta: Positive = 0.5,
  rows: AtLeastOne = 2,
) -> Chosen:
  """Rows accepted with probability exp((R - R_max) / beta): samples of ref exp(R / beta) / Z (RSO).

  The candidates are samples of ref. They are tried in their order, and those accepted leave the
  candidates; then R_max is taken anew, until there are enough (arXiv:2309.06657). Consecutive rows are
  pairs. A large beta takes the first rows, a small one the best ones.

  Args:
    rewards, valid, random: see above.
    beta: temperature, in units of the reward.
    rows: how many rows of a group are accepted.
  """
  _check_rows(rows, valid)
  found, usable = np.zeros((len(valid), rows), int), np.zeros((len(valid), rows), bool)
  for group, (reward, left) in enumerate(zip(rewards, valid.copy())):
    accepted = []
    while len(accepted) < rows and left.any():
      chance = np.exp(np.minimum((reward - reward[left].max()) / beta, 0))
      taken = np.flatnonzero(left & (random.random(len(reward)) < chance))
      accepted += taken.tolist()
      left[taken] = False
    accepted = accepted[:rows]
    found[group, : len(accepted)] = accepted
    usable[group, : len(accepted)] = True
  return Chosen(found, usable)


def best(rewards: Array, valid: Array, *, rows: AtLeastOne = 1) -> Chosen:
  """The rows with the largest rewards, the best first: best of n, RAFT's `local` (arXiv:2304.06767)."""
  _check_rows(rows, valid)
  order = _descending(rewards, valid)[:, :rows]
  return Chosen(order, np.take_along_axis(valid, order, axis=1))


def above(
  rewards: Array,
  valid: Array,
  random: np.random.Generator,
  *,
  threshold: float = 1.0,
  rows: AtLeastOne = 4,
) -> Chosen:
  """At most `rows` rows of a group with reward >= `threshold`, at random (ReST-EM, arXiv:2312.06585)."""
  _check_rows(rows, valid)
  good = valid & (rewards >= threshold)
  order = _shuffled(everything(valid).rows, good, random)[:, :rows]
  return Chosen(order, np.take_along_axis(good, order, axis=1))


def distinct(
  rewards: Array,
  valid: Array,
  texts: Array,
  *,
  threshold: float = 1.0,
  rows: Count = 0,
  pattern: str = '',
) -> Chosen:
  """The rows of a group with reward >= `threshold` that say different things (RFT, arXiv:2308.01825).

  Of rows that say the same the first one stays.

  Args:
    rewards, valid, texts: see above.
    threshold: least reward of a row that stays.
    rows: at most that many rows of a group; 0 is all of them.
    pattern: regular expression; rows say the same if all its matches are equal, such as the equations of
      a solution. Without a pattern, or where it matches nothing, if the texts are equal but for white
      space.

  Raises:
    ValueError: the pattern is no regular expression.
  """
  _check_rows(rows, valid)
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f'pattern={pattern!r} is no regular expression: {error}') from error
  good = valid & (rewards >= threshold)
  for group in range(len(valid)):
    seen = set()
    for row in np.flatnonzero(good[group]):
      key = said(texts[group, row], pattern)
      good[group, row] = key not in seen
      seen.add(key)
  order = np.argsort(~good, axis=1, kind='stable')[:, : rows or None]
  return Chosen(order, np.take_along_axis(good, order, axis=1))


def said(text: str, pattern: str) -> tuple[str, ...]:
  """What a text says: the matches of a pattern without white space, or its words.

  >>> said('First 3 * 4 = 12, then 12+1=13.', r'[\\d+* ]+= *\\d+')
  ('3*4=12', '12+1=13')
  """
  found = [''.join(m.group().split()) for m in re.finditer(pattern, text)] if pattern else []
  return tuple(filter(None, found)) or tuple(text.split())


def top_of_batch(rewards: Array, valid: Array, *, fraction: Fraction = 0.2) -> Chosen:
  """The best rows of the whole batch, round(fraction * rows) of them: RAFT's `top` (arXiv:2304.06767).

  Prompts with low rewards have none of them.
  """
  flat = np.where(valid, rewards, -np.inf).reshape(-1)
  kept = np.zeros(len(flat), bool)
  kept[np.argsort(-flat, kind='stable')[: round(fraction * len(flat))]] = True
  return Chosen(everything(valid).rows, kept.reshape(valid.shape) & valid)


Filter = Literal['best', 'best_half', 'best_worst', 'power']


def filtered(
  rewards: Array,
  valid: Array,
  random: np.random.Generator,
  *,
  strategy: Filter = 'best_worst',
  power: Positive = 2.0,
) -> Chosen:
  """As many rows as a group has, drawn with replacement by `filter_weights` (PF-PPO, arXiv:2409.06957).

  Rewards of a learned model are most reliable for very good and very bad completions, so these are
  trained on more often.

  Args:
    rewards, valid, random: see above.
    strategy, power: see `filter_weights`.
  """
  weights = filter_weights(rewards, valid, strategy=strategy, power=power)
  ends = np.cumsum(weights, axis=1)
  # Each place takes the first row whose cumulative weight exceeds a random number below the total.
  places = random.random(rewards.shape)[:, :, None] * ends[:, None, -1:]
  rows = np.minimum((places >= ends[:, None, :]).sum(axis=2), rewards.shape[1] - 1)
  return Chosen(rows, np.take_along_axis(valid, rows, axis=1))


def filter_weights(
  rewards: Array, valid: Array, *, strategy: Filter = 'best_worst', power: float = 2.0
) -> Array:
  """Probabilities of the rows of each group by their rewards, f[N, G]; 0 without a valid row.

  Rows with equal rewards have equal probabilities, and where all rewards are equal, all have the same.

  Args:
    rewards: f[N, G].
    valid: bool[N, G]; other rows get 0.
    strategy: 'best' takes the best row alone; 'best_half' takes it as often as all others together;
      'best_worst' takes the best and the worst, each with probability 1/2; 'power' takes a row
      proportionally to |R|^power.
    power: of 'power'.

  >>> rewards, valid = np.array([[0.1, 0.9, 0.5, 0.3, 0.2]]), np.ones((1, 5), bool)
  >>> print(filter_weights(rewards, valid, strategy='best_half').round(3))
  [[0.125 0.5   0.125 0.125 0.125]]
  """
  share = lambda kind: kind / np.maximum(kind.sum(axis=1, keepdims=True), 1e-30)
  largest = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True)
  smallest = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True)
  best, worst = valid & (rewards == largest), valid & (rewards == smallest)
  if strategy == 'best':
    found = share(best)
  elif strategy == 'best_half':
    found = share(best) / 2 + share(valid & ~best) / 2
  elif strategy == 'best_worst':
    found = share(best) / 2 + share(worst) / 2
  else:
    found = np.where(valid, np.abs(rewards) ** power, 0.0)
  # Where nothing is preferred, all valid rows are alike.
  alike = (largest == smallest) | (found.sum(axis=1, keepdims=True) <= 0)
  return share(np.where(alike, valid, found).astype(float))


def choose(fn: Callable, arrays: dict[str, Array], random: np.random.Generator) -> Chosen:
  """What a function of this table chooses of the groups.

  Args:
    fn: bound.
    arrays: by name, [N, G, ...].
    random: of the step.
  """
  return call(fn, {**arrays, 'random': random})


def rows_of(fn: Callable, size: int) -> int:
  """How many rows of a group of `size` rows a function of this table chooses.

  Raises:
    ValueError: it wants more rows than there are.
  """
  numbers = np.zeros((1, size))
  blank = {'rewards': numbers, 'lengths': numbers, 'valid': numbers == 0}
  blank |= {'wins': np.zeros((1, size, size)), 'texts': np.full((1, size), '', object)}
  return choose(fn, blank, np.random.default_rng(0)).rows.shape[1]


def _check_rows(rows: int, valid: Array) -> None:
  if rows > valid.shape[1]:
    raise ValueError(f'choose: {rows} rows, but a group has {valid.shape[1]}')


def _descending(score: Array, valid: Array) -> Array:
  """Places by descending score i[N, G]; rows that are not valid come last, of equal ones the first."""
  return np.argsort(np.where(valid, -score, np.inf), axis=1, kind='stable')


def _last(order: Array, valid: Array) -> Array:
  """The last valid place of an order [N, 1], the first place if none is valid."""
  return np.take_along_axis(order, np.maximum(valid.sum(axis=1) - 1, 0)[:, None], axis=1)


def _shuffled(rows: Array, wanted: Array, random: np.random.Generator) -> Array:
  """The places in random order, wanted ones first."""
  key = random.random(rows.shape) + ~np.take_along_axis(wanted, rows, axis=1)
  return np.take_along_axis(rows, np.argsort(key, axis=1), axis=1)


def _pairs(
  first: Array,
  second: Array,
  valid: Array,
  score: Array | None = None,
  min_gap: float = 0.0,
  max_gap: float = float('inf'),
) -> Chosen:
  """Pairs of places [N, k] each, as rows [N, 2 k]; usable where both are valid and the gap fits."""
  if valid.shape[1] < 2:
    raise ValueError('choose: a pair needs groups of at least 2 rows')
  at = lambda x, place: np.take_along_axis(x, place, axis=1)
  usable = at(valid, first) & at(valid, second) & (first != second)
  if score is not None:
    gap = np.abs(at(score, first) - at(score, second))
    usable &= (gap >= min_gap) & (gap < max_gap)
  rows = np.stack([first, second], axis=2).reshape(len(valid), -1)
  return Chosen(rows, np.repeat(usable, 2, axis=1))


def _halves(game: Array, players: list[int]) -> tuple[list[int], list[int]]:
  """Winners and losers of the players paired in their order; one without a partner is among both."""
  winners, losers = [], []
  for one, other in zip(players[::2], players[1::2]):
    order = (one, other) if game[one, other] >= 0.5 else (other, one)
    winners.append(order[0])
    losers.append(order[1])
  alone = players[len(players) // 2 * 2 :]
  return winners + alone, losers + alone


TABLE = table(
  'picks',
  everything,
  best_worst,
  best_second,
  best_random,
  random_pair,
  all_pairs,
  best_worst_by_wins,
  tournament,
  rejection,
  best,
  above,
  distinct,
  top_of_batch,
  filtered,
)
Part = Annotated[Callable, TABLE]
