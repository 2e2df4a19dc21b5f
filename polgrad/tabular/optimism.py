"""An actor that follows optimistic critics of a finite class: a reference of theory, not a loss.

A critic is a table f[h, s, a], and the class has finitely many. After each episode the critics that the
data do not contradict are the version space

    F_t = {f: sum_h L_h(f_h, f_{h+1}) - min_g L_h(g, f_{h+1}) <= beta}
    L_h(g, f) = sum over the data of step h of (g(s, a) - r - max_a' f(s', a'))^2

f_t is the critic of F_t with the largest value at the start, and the actor makes a mirror step,
pi_{t+1} ~ pi_t exp(eta f_t), but returns to the uniform policy where the critic has changed. Offline
data may be there from the beginning (hybrid learning).

NumPy, float64. Confidence: PAPER (an account of it).
"""

from collections.abc import Sequence

import numpy as np

from polgrad.tabular.hybrid import Offline, Process, episodes, softmax

Array = np.ndarray


def losses(critics: Array, followers: Array, data: Offline) -> Array:
  """L(g, f) of one step for every pair of critics, f64[M, M]: row g, column f.

  Args:
    critics: g of this step, [M, S, A].
    followers: f of the next step, [M, S, A]; zeros after the last one.
    data: transitions of this step.
  """
  own = critics[:, data.states, data.actions]
  wanted = data.rewards + followers.max(axis=-1)[:, data.next_states]
  return ((own[:, None] - wanted[None]) ** 2).sum(axis=-1)


def residuals(critics: Array, data: Sequence[Offline]) -> Array:
  """sum_h L_h(f_h, f_{h+1}) - min_g L_h(g, f_{h+1}) of every critic, f64[M], at least 0.

  The second term is the noise of the data, as far as the class can say: it is subtracted because the
  squared error of one sample is not 0 even for the right critic.

  Args:
    critics: [M, H, S, A].
    data: transitions by step, H of them.
  """
  found = np.zeros(len(critics))
  for h, some in enumerate(data):
    last = h == len(data) - 1
    followers = np.zeros_like(critics[:, h]) if last else critics[:, h + 1]
    table = losses(critics[:, h], followers, some)
    found += np.diagonal(table) - table.min(axis=0)
  return found


def optimistic(critics: Array, data: Sequence[Offline], start: Array, *, beta: float) -> int:
  """The critic of the version space with the largest expected value at the start, the first of equals.

  The version space is never empty: where all residuals exceed beta, it has those of the least.

  Args:
    critics: [M, H, S, A].
    data: transitions by step.
    start: probabilities of the first state, [S].
    beta: largest residual, in units of the squared reward.
  """
  found = residuals(critics, data)
  inside = found <= max(beta, found.min())
  value = critics[:, 0].max(axis=-1) @ start
  return int(np.argmax(np.where(inside, value, -np.inf)))


def followed(log_policy: Array, critic: Array, *, step_size: float, changed: bool) -> Array:
  """log pi' with pi' ~ pi exp(eta f), from the uniform policy if the critic has changed, [H, S, A]."""
  begin = np.zeros_like(critic) if changed else log_policy
  moved = begin + step_size * critic
  moved = moved - moved.max(axis=-1, keepdims=True)
  return moved - np.log(np.exp(moved).sum(axis=-1, keepdims=True))


def optimal_values(process: Process) -> Array:
  """Q* of a process, f64[H, S, A]."""
  found, after = np.zeros_like(process.rewards), np.zeros(len(process.start))
  for h in reversed(range(len(found))):
    found[h] = process.rewards[h] + process.moves[h] @ after
    after = found[h].max(axis=-1)
  return found


def play(
  process: Process,
  critics: Array,
  *,
  rounds: int,
  number: int,
  step_size: float,
  beta: float,
  random: np.random.Generator,
  offline: Sequence[Offline] | None = None,
) -> tuple[Array, list[int]]:
  """The policy f64[H, S, A] after some rounds, and the critic of each round.

  Args:
    critics: [M, H, S, A].
    number: episodes of a round.
    step_size: eta.
    beta: of the version space.
    offline: transitions by step that are there from the beginning; None: none.
  """
  empty = Offline(*(np.zeros(0, int),) * 2, np.zeros(0), np.zeros(0, int))
  data = list(offline) if offline else [empty] * len(process.rewards)
  log_policy, chosen = np.zeros_like(process.rewards), []
  for _ in range(rounds):
    best = optimistic(critics, data, process.start, beta=beta)
    changed = not chosen or best != chosen[-1]
    chosen.append(best)
    log_policy = followed(log_policy, critics[best], step_size=step_size, changed=changed)
    _, fresh = episodes(process, softmax(log_policy), number, random)
    data = [Offline(*map(np.concatenate, zip(x, y))) for x, y in zip(data, fresh)]
  return softmax(log_policy), chosen
