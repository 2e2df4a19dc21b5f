"""When to ask a stronger model for help within a budget: planning with a price.

A policy acts for H steps. Before each it may ask for help, which changes how the state moves. The
expected number of requests is to be at most a budget C. For a price of a request the best plan is that
of dynamic programming, and the smallest price at which it asks at most C times is found by bisection.
The plan's choices are the labels on which a model is trained to ask.

The phases are: rollouts that ask at random (`sampled`), a model of success and of the moves
(`fitted`), the price (`affordable`), labels (`labels`). States are numbers. How those of a language
model are grouped into numbers is left to the caller.

NumPy, float64. Confidence: PAPER (the phases), MEMORY (the form of the recursion).
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Process(NamedTuple):
  """How states move, with and without help; the probability to succeed at the end."""

  alone: Array  # f64[H, S, S], rows sum to 1
  helped: Array  # f64[H, S, S]
  success: Array  # f64[S], of the last state


class Plan(NamedTuple):
  """The best plan at a price."""

  value: Array  # f64[H + 1, S], success less what requests cost
  usage: Array  # f64[H + 1, S], expected requests from here on
  solved: Array  # f64[H + 1, S], probability to succeed
  ask: Array  # bool[H, S]


def chain(alone: Array, helped: Array) -> Process:
  """A process that fails for good at the first step that goes wrong: state 0 is well, 1 has failed.

  Args:
    alone, helped: probabilities that a step goes well, [H].
  """

  def moves(q):
    q = np.asarray(q, np.float64)
    return np.stack([np.array([[p, 1 - p], [0.0, 1.0]]) for p in q])

  return Process(moves(alone), moves(helped), np.array([1.0, 0.0]))


def planned(process: Process, price: float) -> Plan:
  """V(s) = max{E_alone V(s'), E_helped V(s') - price}, backwards in time; in a tie nobody is asked.

  >>> process = chain([0.9, 0.5, 0.7], [0.98, 0.95, 0.9])
  >>> plan = planned(process, 0.15)
  >>> print(plan.ask[:, 0], plan.usage[0, 0].round(4), plan.solved[0, 0].round(4))
  [False  True  True] 1.755 0.7695
  """
  value = [np.asarray(process.success, np.float64)]
  solved, usage, asks = list(value), [np.zeros_like(value[0])], []
  for alone, helped in zip(process.alone[::-1], process.helped[::-1]):
    without, with_help = alone @ value[0], helped @ value[0] - price
    ask = with_help > without + 1e-12
    take = lambda x, y, ask=ask: np.where(ask, y, x)
    value.insert(0, take(without, with_help))
    solved.insert(0, take(alone @ solved[0], helped @ solved[0]))
    usage.insert(0, take(alone @ usage[0], 1 + helped @ usage[0]))
    asks.insert(0, ask)
  return Plan(np.stack(value), np.stack(usage), np.stack(solved), np.stack(asks))


def affordable(process: Process, start: int, budget: float, *, tolerance: float = 1e-9) -> float:
  """The smallest price at which the plan asks at most `budget` times from a state, up to the tolerance.

  The expected number of requests does not grow with the price, so this is a bisection. At a price of 1
  nobody is asked, because success is worth 1.

  Args:
    start: the first state.
    budget: expected number of requests, at least 0.
    tolerance: of the price, which is too large by at most this much.
  """
  if budget < 0:
    raise ValueError(f'budget: expected at least 0 requests, got {budget}')
  fits = lambda price: planned(process, price).usage[0, start] <= budget + 1e-12
  if fits(0.0):
    return 0.0
  low, high = 0.0, 1.0
  while high - low > tolerance:
    middle = (low + high) / 2
    low, high = (low, middle) if fits(middle) else (middle, high)
  return high


class Rollouts(NamedTuple):
  """Episodes in which help was asked for at random."""

  states: Array  # i[N, H + 1]
  asked: Array  # bool[N, H]
  solved: Array  # bool[N]


def sampled(
  process: Process, start: int, number: int, random: np.random.Generator, *, rate: float = 0.5
) -> Rollouts:
  """Episodes that ask with probability `rate` before every step."""
  horizon = len(process.alone)
  states = np.full((number, horizon + 1), start)
  asked = random.random((number, horizon)) < rate
  for h in range(horizon):
    moves = np.where(
      asked[:, h, None], process.helped[h][states[:, h]], process.alone[h][states[:, h]]
    )
    u = random.random((number, 1))
    states[:, h + 1] = (np.cumsum(moves, axis=1) <= u).sum(axis=1).clip(max=moves.shape[1] - 1)
  solved = random.random(number) < process.success[states[:, -1]]
  return Rollouts(states, asked, solved)


def fitted(rollouts: Rollouts, states: int, *, prior: float = 0.0) -> Process:
  """The process as rollouts show it: frequencies of moves and of success.

  Args:
    states: number of states.
    prior: is added to every count; with 0 a state that was never left stays where it is, and one in
      which no episode ended has success 0.
  """
  horizon = rollouts.asked.shape[1]
  counts = np.full((2, horizon, states, states), float(prior))
  for h in range(horizon):
    now, then = rollouts.states[:, h], rollouts.states[:, h + 1]
    np.add.at(counts, (rollouts.asked[:, h].astype(int), h, now, then), 1.0)
  visits = counts.sum(axis=-1, keepdims=True)
  moves = np.where(visits > 0, counts / np.where(visits > 0, visits, 1), np.eye(states))
  ended = np.bincount(rollouts.states[:, -1], minlength=states) + 2 * prior
  right = np.bincount(rollouts.states[:, -1], weights=rollouts.solved, minlength=states) + prior
  return Process(moves[0], moves[1], right / np.where(ended > 0, ended, 1))


def labels(plan: Plan, rollouts: Rollouts) -> list[tuple[int, int, bool]]:
  """(step, state, whether to ask) for every state that the rollouts visited before a step, sorted."""
  visited = {
    (h, int(s)) for h in range(len(plan.ask)) for s in np.unique(rollouts.states[:, h]).tolist()
  }
  return [(h, s, bool(plan.ask[h, s])) for h, s in sorted(visited)]
