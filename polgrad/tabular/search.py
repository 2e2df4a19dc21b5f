"""Decision-time search as one policy update, and optimistic mirror descent for online convex problems.

`search_step` improves a given policy (the *blueprint*) in the state that has just been reached: it
estimates the value of each action by rollouts that continue with the blueprint, and makes one mirror
step. `optimistic_descent` plays against a sequence of gradients, with the last gradient as a guess
of the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polgrad.tabular.games import mirror_step
from polgrad.types import Array

Rollout = Callable[[Array, Array], Array]  # (random key, action i32[]) -> return f32[]


def rollout_values(rollout: Rollout, key: Array, *, actions: int, rollouts: int) -> Array:
  """The mean return of each action, [actions]; every action gets the same random keys.

  Args:
    rollout: plays one game: draws a state that is consistent with what the player knows, takes the
      action, and continues with the blueprint for everybody. It is vmapped.
    key: random key.
    actions: number of actions.
    rollouts: games for each action. Common random keys make differences of actions less noisy.
  """
  keys = jax.random.split(key, rollouts)
  of_action = lambda action: jnp.mean(jax.vmap(lambda k: rollout(k, action))(keys))
  return jax.vmap(of_action)(jnp.arange(actions))


def search_step(
  log_blueprint: Array,
  q: Array,
  *,
  step_size: float,
  alpha: float = 0.0,
  log_magnet: Array | None = None,
  legal: Array | None = None,
) -> Array:
  """The policy to play in one state: one mirror step from the blueprint (arXiv:2304.13138).

      MDS    pi' ~ pi exp(eta q)                                       alpha = 0
      MMDS   pi' ~ [pi rho^(eta alpha) exp(eta q)]^(1 / (1 + eta alpha))

  Exactly one step is made in each state that is visited, so the players together make one update of
  their joint policy; more steps on the same q are another algorithm. MDS is for games of common
  interest; MMDS is for games of opponents, where MDS would circle.

  With step_size -> 0 it is the blueprint, and with alpha = 0 and a large step the best action. With the
  magnet at the blueprint it is MDS of step eta / (1 + eta alpha).

  Args:
    log_blueprint: log pi, [..., n], nats; may be -inf for actions that are not legal.
    q: values of the actions under the blueprint, [..., n]; a constant may be added.
    step_size: eta, in 1 / unit of q.
    alpha: weight of the magnet, in the unit of q. The paper's values of both are not released.
    log_magnet: log rho, [..., n]; None: uniform over legal actions.
    legal: bool[..., n], True for at least one action; None: all are.

  Returns:
    log pi', [..., n]; -inf for actions that are not legal.
  """
  legal = jnp.ones(q.shape, bool) if legal is None else legal
  magnet = jnp.zeros_like(q) if log_magnet is None else log_magnet
  # Actions that are not legal take part with finite numbers, and are removed afterwards.
  finite = lambda x: jnp.where(legal, x, 0.0)
  moved = mirror_step(
    finite(log_blueprint), finite(q), step_size, alpha, finite(magnet), implicit=True
  )
  return jax.nn.log_softmax(jnp.where(legal, moved, -jnp.inf), axis=-1)


class Played(NamedTuple):
  """What `optimistic_descent` did in T rounds.

  Attributes:
    points: [T, d], the points that were played.
    gradients: [T, d], the gradients at these points.
    step_sizes: [T].
    surprise: f32[], the sum of |g_t - g_(t-1)|^2, with g_0 = 0; regret grows with its root.
  """

  points: Array
  gradients: Array
  step_sizes: Array
  surprise: Array


def optimistic_descent(
  gradient: Callable[[Array, Array], Array],
  start: Array,
  *,
  rounds: int,
  radius: float,
  largest_gradient: float,
  convexity: float = 0.0,
  delta: float = 1.0,
) -> Played:
  """Optimistic mirror descent in a ball, with the last gradient as a hint (arXiv:2302.04552).

      play   x_t  = project(h_t - eta_t g_(t-1)),    g_t the gradient at x_t,   g_0 = 0
      move   h_(t+1) = project(h_t - eta_t g_t)
      eta_t = D / sqrt(delta + 4 G^2 + sum_{s<t} |g_s - g_(s-1)|^2),    D = 2 radius

  The regret is at most D^2 / (2 eta_T) + sum_t eta_t |g_t - g_(t-1)|^2 for any convex losses. It stays
  constant when the losses do not change, and is of order sqrt(T) when an adversary chooses them.

  Differences: the paper's variant for exp-concave losses, which projects in a norm that changes in
  each round, is left out.

  Args:
    gradient: (point [d], number of the round i32[], from 0) -> gradient of that round's loss, [d].
    start: h_1, [d], inside the ball.
    rounds: T.
    radius: of the ball around 0.
    largest_gradient: G, a bound of the norm of every gradient.
    convexity: modulus of strong convexity lambda; above 0 the step size is 2 / (lambda t) instead
      (the constant is from memory). 0 (default): convex losses.
    delta: added below the root, default 1.
  """
  diameter = 2 * radius

  def project(x):
    return x * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(x), 1e-30))

  def advance(carry, round):
    center, hint, surprise = carry
    eta = diameter / jnp.sqrt(delta + 4 * largest_gradient**2 + surprise)
    if convexity:
      eta = 2 / (convexity * (round + 1.0))
    point = project(center - eta * hint)
    g = gradient(point, round)
    surprise = surprise + jnp.sum(jnp.square(g - hint))
    return (project(center - eta * g), g, surprise), (point, g, eta)

  first = (start, jnp.zeros_like(start), jnp.zeros((), start.dtype))
  (_, _, surprise), played = jax.lax.scan(advance, first, jnp.arange(rounds))
  return Played(*played, surprise)
