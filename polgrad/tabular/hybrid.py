"""Hybrid natural policy gradient on a finite process: on-policy and offline data together (HNPG).

A process has H steps, S states and A actions. The critic of step h is fitted to the returns of the
policy's own episodes and, on offline data, to one step of the Bellman equation of the present policy:

    loss(Q_h) = mean over on-policy of (Q_h(s, a) - G)^2
                + weight * mean over offline of (Q_h(s, a) - r - E_{a' ~ pi} Q_{h+1}(s', a'))^2

The policy makes a step of the natural gradient, which for a softmax over a table is exactly
theta <- theta + eta A. Without offline data this is the natural policy gradient, and without on-policy
data it is fitted policy iteration (arXiv:2311.08384).

NumPy, float64. Confidence: CODE (losses), and exact updates in place of its conjugate gradients.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Process(NamedTuple):
  """A finite process; a step's reward depends on state and action."""

  moves: Array  # f64[H, S, A, S], rows sum to 1
  rewards: Array  # f64[H, S, A]
  start: Array  # f64[S]


class OnPolicy(NamedTuple):
  """What the policy did at one step, and the sums of rewards from there on, [N]."""

  states: Array
  actions: Array
  returns: Array


class Offline(NamedTuple):
  """Transitions at one step that somebody else made, [N]."""

  states: Array
  actions: Array
  rewards: Array
  next_states: Array


def lock(horizon: int = 5, actions: int = 3, seed: int = 0) -> Process:
  """A combination lock: one action of each step leads on, all others to a state without reward.

  State 0 is on the way, 1 is lost. Only the right action of the last step is rewarded, with 1. A policy
  that chooses at random opens the lock with the probability actions^-horizon.
  """
  right = np.random.default_rng(seed).integers(actions, size=horizon)
  moves = np.zeros((horizon, 2, actions, 2))
  moves[..., 1] = 1.0
  rewards = np.zeros((horizon, 2, actions))
  for h, a in enumerate(right):
    moves[h, 0, a] = [1.0, 0.0]
  rewards[-1, 0, right[-1]] = 1.0
  return Process(moves, rewards, np.array([1.0, 0.0]))


def values(process: Process, policy: Array) -> tuple[Array, Array]:
  """Q^pi f64[H, S, A] and V^pi f64[H + 1, S] of a policy f64[H, S, A], exactly."""
  horizon, states, _ = process.rewards.shape
  q, v = np.zeros_like(process.rewards), np.zeros((horizon + 1, states))
  for h in reversed(range(horizon)):
    q[h] = process.rewards[h] + process.moves[h] @ v[h + 1]
    v[h] = (policy[h] * q[h]).sum(axis=-1)
  return q, v


def softmax(theta: Array) -> Array:
  """exp(theta) / sum over the last axis."""
  powers = np.exp(theta - theta.max(axis=-1, keepdims=True))
  return powers / powers.sum(axis=-1, keepdims=True)


def npg_step(theta: Array, q: Array, *, step_size: float) -> Array:
  """theta + eta A with A = Q - E_pi Q: pi' ~ pi exp(eta A), the natural gradient of a softmax.

  Args:
    theta: logits of the policy, [..., A].
    q: its values, [..., A].
    step_size: eta, in 1 / unit of the reward.
  """
  advantages = q - (softmax(theta) * q).sum(axis=-1, keepdims=True)
  return theta + step_size * advantages


def targets(offline: Offline, policy: Array | None, q: Array | None) -> Array:
  """r + E_{a' ~ pi} Q(s', a'), f64[N].

  Args:
    policy: of the next step, f64[S, A]; None after the last step, where the target is r.
    q: critic of the next step, [S, A].
  """
  if policy is None:
    return np.asarray(offline.rewards, np.float64)
  return offline.rewards + (policy * q).sum(axis=-1)[offline.next_states]


def critic_loss(
  q: Array,
  own: OnPolicy | None,
  offline: Offline | None,
  *,
  next_policy: Array | None = None,
  next_q: Array | None = None,
  weight: float = 1.0,
) -> float:
  """The loss of the critic of a step, see the module; a part without data is 0.

  Args:
    q: critic [S, A].
    own: of the step; None: no on-policy data.
    offline: of the step; None: no offline data.
    next_policy, next_q: of the next step, see `targets`.
    weight: of the offline part.
  """
  loss = 0.0
  if own is not None and len(own.states):
    loss += np.mean((q[own.states, own.actions] - own.returns) ** 2)
  if offline is not None and len(offline.states):
    wanted = targets(offline, next_policy, next_q)
    loss += weight * np.mean((q[offline.states, offline.actions] - wanted) ** 2)
  return float(loss)


def fitted_critic(
  shape: tuple[int, int],
  own: OnPolicy | None,
  offline: Offline | None,
  *,
  next_policy: Array | None = None,
  next_q: Array | None = None,
  weight: float = 1.0,
) -> Array:
  """The table [S, A] that minimises `critic_loss`; 0 where there is no data."""
  mass, total = np.zeros(shape), np.zeros(shape)

  def add(states, actions, wanted, scale):
    np.add.at(mass, (states, actions), scale / max(len(states), 1))
    np.add.at(total, (states, actions), scale * wanted / max(len(states), 1))

  if own is not None:
    add(own.states, own.actions, own.returns, 1.0)
  if offline is not None:
    add(offline.states, offline.actions, targets(offline, next_policy, next_q), weight)
  return np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), 0.0)


def episodes(
  process: Process, policy: Array, number: int, random: np.random.Generator
) -> tuple[list[OnPolicy], list[Offline]]:
  """Episodes of a policy, by step: as on-policy data, and as transitions."""
  horizon, _, actions = process.rewards.shape
  pick = lambda chances: (np.cumsum(chances, axis=1) <= random.random((number, 1))).sum(axis=1)
  state, steps = pick(np.tile(process.start, (number, 1))), []
  for h in range(horizon):
    action = pick(policy[h][state]).clip(max=actions - 1)
    then = pick(process.moves[h][state, action]).clip(max=len(process.start) - 1)
    steps.append(Offline(state, action, process.rewards[h][state, action], then))
    state = then
  returns = np.cumsum([step.rewards for step in steps[::-1]], axis=0)[::-1]
  return [OnPolicy(s.states, s.actions, g) for s, g in zip(steps, returns)], steps


def critics(
  shape: tuple[int, int],
  own: list[OnPolicy] | None,
  offline: list[Offline] | None,
  policy: Array,
  *,
  weight: float = 1.0,
) -> Array:
  """The critics of all steps, fitted backwards in time, f64[H, S, A]."""
  found = np.zeros((len(policy), *shape))
  for h in reversed(range(len(policy))):
    last = h == len(policy) - 1
    found[h] = fitted_critic(
      shape,
      own[h] if own else None,
      offline[h] if offline else None,
      next_policy=None if last else policy[h + 1],
      next_q=None if last else found[h + 1],
      weight=weight,
    )
  return found


def train(
  process: Process,
  offline: list[Offline] | None,
  *,
  steps: int,
  number: int,
  step_size: float,
  random: np.random.Generator,
  weight: float = 1.0,
) -> Array:
  """The policy after some steps of hybrid natural policy gradient from the uniform one, f64[H, S, A].

  Args:
    offline: transitions by step; None: on-policy data alone.
    number: episodes of a step; 0: offline data alone.
    step_size: of `npg_step`.
  """
  theta = np.zeros_like(process.rewards)
  for _ in range(steps):
    policy = softmax(theta)
    own = episodes(process, policy, number, random)[0] if number else None
    found = critics(theta.shape[1:], own, offline, policy, weight=weight)
    theta = npg_step(theta, found, step_size=step_size)
  return softmax(theta)
