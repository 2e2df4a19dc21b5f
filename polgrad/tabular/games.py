"""Matrix games between policies: solvers as mirror steps, and distances to an equilibrium.

A preference matrix P[y, y'] is the probability that y beats y'. Choosing a policy that no other policy
beats is a game: two players choose y and y', and one wins with probability P[y, y']. Preferences may
be intransitive (rock beats scissors, ...), so no reward per action explains them. With a weight `tau`
and a reference policy mu, the regularised game is

    max over pi, min over pi' of   P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu),

whose only equilibrium solves pi = softmax(log mu + P(. > pi) / tau). At tau = 0 it is the plain game.

Every solver here is one step repeated by `solve`. A step reads the values q of all actions against the
present opponent and moves the log-policy with `mirror_step`:

    solver                      opponent                   mirror_step
    --------------------------  -------------------------  ------------------------------------
    multiplicative_weights      the policy itself          explicit, without regulariser
    optimistic_weights          2 q_t - q_(t-1)            explicit, without regulariser
    inpo                        the policy itself          explicit
    nash_md                     mixture with the reference explicit
    nash_ema                    average of past policies   explicit
    egpo                        the policy half a step on  explicit, from where the half step began
    nash_mp                     the policy half a step on  implicit, from where the half step began
    mmd                         the policy itself          implicit, towards a magnet that may move
    best_response               the policy itself          forgets the policy
    comal                       of an inner solver         the reference becomes its result

Letters in shapes: `n`, `m` actions of the first and second player. Further axes before them are
independent games, such as prompts. Values are in the unit of the payoff, log-policies in nats. Numbers
are float64 where JAX has it switched on, and float32 otherwise.

To add a solver, write a function that returns a `Solver`; docs/games.md shows one of ten lines.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polgrad.types import Array

# One log-policy [..., n] a player. A game that a policy plays against itself has one player.
Policies = tuple[Array, ...]
Schedule = Callable[[Array], Array | float]  # number of the step, from 0 -> step size


class Game(NamedTuple):
  """Payoffs, and the reference policies that regularisers pull to; make one with `game`.

  Attributes:
    payoff: [..., n, m], what the row player wins and the column player loses.
    log_reference: the log-probabilities of the reference of each player, nats.
  """

  payoff: Array
  log_reference: Policies


class Solver(NamedTuple):
  """A rule that improves policies, as two pure functions and a default step size.

  Attributes:
    init: (game, policies) -> memory, any pytree of arrays that the solver carries.
    step: (game, policies, memory, step size) -> (policies, memory).
    schedule: number of the step, from 0 -> step size, used where `solve` gets no other.
  """

  init: Callable[[Game, Policies], Any]
  step: Callable[[Game, Policies, Any, Array], tuple[Policies, Any]]
  schedule: Schedule


class Path(NamedTuple):
  """The policies at every step of a solver, with one more leading axis of length steps + 1.

  Attributes:
    last: log-policies of each player, the first of them before any step.
    average: log of the mean of the probabilities so far, of each player.
  """

  last: Policies
  average: Policies


def game(payoff: Array, *, reference: Array | None = None, players: int = 1) -> Game:
  """A game; by default the one that a policy plays against itself.

  Args:
    payoff: [..., n, m]. With one player, n = m, and entry [y, y'] is the probability that y beats y':
      payoff + payoff^T = 1. With two players any numbers, of which the row player wants much.
    reference: [..., n] probabilities, all positive; None (default): uniform. Two players get a tuple.
    players: 1 (default): one policy plays against itself; 2: two policies.

  Raises:
    ValueError: with one player, payoff + payoff^T is not 1.
  """
  payoff = jnp.asarray(payoff, float)
  other = jnp.swapaxes(payoff, -1, -2)
  symmetric = payoff.shape == other.shape and jnp.allclose(payoff + other, 1, atol=1e-5)
  if players == 1 and not symmetric:
    raise ValueError(
      'payoff + its transpose must be 1 in a game of one policy against itself; antisymmetric payoffs '
      'A become probabilities as 1/2 + A / (2 max |A|), and other games have players=2'
    )
  shapes = (payoff.shape[:-1], (*payoff.shape[:-2], payoff.shape[-1]))[:players]
  if reference is None:
    references = tuple(jnp.ones(shape, payoff.dtype) for shape in shapes)
  else:
    references = reference if isinstance(reference, tuple) else (reference,)
  # log_softmax of a log-probability normalises it, so weights are taken as well.
  return Game(payoff, tuple(_normalised(jnp.log(jnp.asarray(r, float))) for r in references))


def values(game: Game, policies: Policies) -> Policies:
  """What each action of each player wins on average against the other player's policy, [..., n].

  With one player it is P(y > pi), for each y.
  """
  against = lambda payoff, log_policy: jnp.einsum('...ij,...j->...i', payoff, jnp.exp(log_policy))
  if len(policies) == 1:
    return (against(game.payoff, policies[0]),)
  rows, columns = policies
  return against(game.payoff, columns), -against(jnp.swapaxes(game.payoff, -1, -2), rows)


def mirror_step(
  log_policy: Array,
  q: Array,
  step_size: Array | float,
  alpha: Array | float = 0.0,
  log_magnet: Array | float = 0.0,
  *,
  implicit: bool = False,
) -> Array:
  """One mirror descent step on the simplex, for eta = step_size and the magnet rho.

      explicit:   pi' ~ pi^(1 - eta alpha) rho^(eta alpha) exp(eta q)
      implicit:   pi' ~ [pi rho^(eta alpha) exp(eta q)]^(1 / (1 + eta alpha))

  Both maximise eta <q, pi'> - KL(pi', pi), less eta alpha times a regulariser: the explicit step takes
  its linear approximation at pi, the implicit one KL(pi', rho) itself. With alpha = 0 both are
  multiplicative weights (MDS of arXiv:2304.13138), and the implicit step is magnetic mirror descent
  (arXiv:2206.05825; taken once, MMDS). A constant added to q changes nothing.

  Args:
    log_policy: log pi, [..., n], nats.
    q: values of the actions, [..., n].
    step_size: eta; the explicit step needs eta * alpha <= 1.
    alpha: weight of the regulariser, in the unit of q.
    log_magnet: log rho, [..., n], finite.

  Returns:
    log pi', [..., n], normalised.
  """
  pull = step_size * alpha
  if implicit:
    return _normalised((log_policy + step_size * q + pull * log_magnet) / (1 + pull))
  return _normalised((1 - pull) * log_policy + pull * log_magnet + step_size * q)


def solve(
  game: Game,
  solver: Solver,
  *,
  steps: int,
  schedule: Schedule | float | None = None,
  start: Policies | Array | None = None,
) -> Path:
  """The policies of `steps` steps of a solver.

  Args:
    game: the game.
    solver: one of those in this module, or of your own.
    steps: number of steps.
    schedule: step size, or a function from the number of the step (from 0) to it; None: the solver's.
    start: log-policies [..., n] of each player, normalised, or one array if there is one player; None:
      the references.
  """
  start = game.log_reference if start is None else start
  start = start if isinstance(start, tuple) else (start,)
  if schedule is None:
    schedule = solver.schedule
  rate = schedule if callable(schedule) else lambda step: schedule

  def advance(carry, step):
    policies, memory, total = carry
    policies, memory = solver.step(game, policies, memory, rate(step))
    total = jax.tree.map(jnp.logaddexp, total, policies)
    mean = jax.tree.map(lambda x: x - jnp.log(step + 2.0), total)
    return (policies, memory, total), (policies, mean)

  # A step number of floating point, so that schedules divide by it.
  numbers = jnp.arange(steps).astype(game.payoff.dtype)
  first = (start, solver.init(game, start), start)
  _, (last, average) = jax.lax.scan(advance, first, numbers)
  joined = lambda one, rest: jnp.concatenate([one[None], rest])
  return Path(jax.tree.map(joined, start, last), jax.tree.map(joined, start, average))


# Solvers -------------------------------------------------------------------------------------------


def multiplicative_weights(step_size: float = 0.5) -> Solver:
  """pi' ~ pi exp(eta P(. > pi)): hedge, and the exact form of three methods of language models.

  SPPO (arXiv:2405.00675) has eta = 1 / beta, DNO (arXiv:2404.03715) eta = 1 / eta_DNO, and SPO
  (arXiv:2401.04056) trains on P(. > pi) as a reward. Only the average of the policies converges; the
  last one circles outwards in intransitive games. One step never loses against the policy before.
  """
  return _simple(lambda policy, q, reference, eta: mirror_step(policy, q, eta), step_size)


def inpo(tau: float, *, step_size: float = 1.0) -> Solver:
  """pi' ~ pi^(1 - eta tau) mu^(eta tau) exp(eta P(. > pi)): INPO, regularised online mirror descent.

  arXiv:2407.00617, whose eta is the inverse of the step size here. Its fixed point is the regularised
  equilibrium itself, whatever the step size.
  """
  return _simple(
    lambda policy, q, reference, eta: mirror_step(policy, q, eta, tau, reference), step_size
  )


def best_response(tau: float) -> Solver:
  """pi' = softmax(log mu + P(. > pi) / tau), without memory of pi: circles where tau is small."""
  respond = lambda policy, q, reference, eta: _normalised(reference + q / tau)
  return _simple(respond, 1.0)


def nash_md(tau: float, *, schedule: Schedule | None = None) -> Solver:
  """Nash-MD (arXiv:2312.00886): the opponent is a geometric mixture of policy and reference.

      s = pi^(1 - eta tau) mu^(eta tau) / Z,    pi' ~ s exp(eta P(. > s))

  With the schedule eta_t = 2 / (tau (t + 2)), which is the default, KL(pi*, pi_T) is at most
  8 / (tau^2 (T + 1)). A constant step size has a biased limit: its mixture s is the equilibrium at
  tau / (1 - eta tau), not at tau.
  """

  def step(game, policies, memory, eta):
    weight = jnp.minimum(1.0, eta * tau)
    mixture = jax.tree.map(
      lambda p, r: _normalised((1 - weight) * p + weight * r), policies, game.log_reference
    )
    move = lambda s, q: mirror_step(s, q, eta)
    return jax.tree.map(move, mixture, values(game, mixture)), memory

  return Solver(_nothing, step, schedule or (lambda t: 2 / (tau * (t + 2))))


def nash_ema(tau: float, *, decay: float = 0.9, step_size: float = 1.0) -> Solver:
  """INPO's step against the average a' = decay a + (1 - decay) pi of past policies.

  Averages are of probabilities. The paper (arXiv:2312.00886) averages parameters of networks and
  states no tabular form; this one is ours. Decay 0 is INPO.
  """

  def step(game, policies, average, eta):
    move = lambda p, q, r: mirror_step(p, q, eta, tau, r)
    policies = jax.tree.map(move, policies, values(game, average), game.log_reference)
    mixed = lambda a, p: jnp.log(decay * jnp.exp(a) + (1 - decay) * jnp.exp(p))
    return policies, jax.tree.map(mixed, average, policies)

  return Solver(lambda game, policies: policies, step, _constant(step_size))


def nash_mp(beta: float, *, step_size: float = 2.0) -> Solver:
  """Nash-MP (arXiv:2505.19731): a half step against pi, then the step against the half step's result.

      half = implicit step from pi against pi,    pi' = implicit step from pi against half

  The paper's step size is `beta` times the one here, so its 2 beta is the default 2. Then
  KL(pi*, pi_k) <= (1 + 2 beta)^-k KL(pi*, pi_0), and a step evaluates the preferences twice.
  """
  move = lambda p, q, r, eta: mirror_step(p, q, eta, beta, r, implicit=True)
  return Solver(_nothing, _extragradient(move), _constant(step_size))


def egpo(tau: float, *, step_size: float = 1.0) -> Solver:
  """EGPO (arXiv:2503.08942): as `nash_mp`, with explicit steps."""
  move = lambda p, q, r, eta: mirror_step(p, q, eta, tau, r)
  return Solver(_nothing, _extragradient(move), _constant(step_size))


def mmd(alpha: float, *, magnet_rate: float = 0.0, step_size: float = 0.1) -> Solver:
  """Magnetic mirror descent (arXiv:2206.05825): an implicit step towards a magnet.

      pi' ~ [pi rho^(eta alpha) exp(eta q)]^(1 / (1 + eta alpha)),    rho' ~ rho^(1 - m) pi'^m

  Args:
    alpha: temperature, in the unit of the payoff.
    magnet_rate: m. 0 (default) keeps the magnet at the reference, and the policies converge to the
      regularised equilibrium with tau = alpha. Above 0 they converge to one of the plain game.
    step_size: eta. Convergence is proven for eta <= alpha / max |payoff|^2.
  """

  def step(game, policies, magnets, eta):
    move = lambda p, q, r: mirror_step(p, q, eta, alpha, r, implicit=True)
    policies = jax.tree.map(move, policies, values(game, policies), magnets)
    follow = lambda r, p: _normalised((1 - magnet_rate) * r + magnet_rate * p)
    return policies, jax.tree.map(follow, magnets, policies)

  return Solver(lambda game, policies: game.log_reference, step, _constant(step_size))


def optimistic_weights(step_size: float = 0.5) -> Solver:
  """pi' ~ pi exp(eta (2 q_t - q_(t-1))): optimistic multiplicative weights (arXiv:1311.1869).

  The same as two-sequence optimistic mirror descent with the last values as a hint. The first step
  has no earlier values and is that of `multiplicative_weights`. In a zero-sum game with a single
  equilibrium of full support the last policy converges to it.
  """

  def step(game, policies, before, eta):
    now = values(game, policies)
    move = lambda p, q, old: mirror_step(p, 2 * q - old, eta)
    return jax.tree.map(move, policies, now, before), now

  return Solver(values, step, _constant(step_size))


def comal(inner: Solver, *, inner_steps: int) -> Solver:
  """COMAL (arXiv:2410.23223): solves the regularised game, and makes the result the new reference.

  The proximal point method: its last policy converges to an equilibrium of the plain game. One step
  is one outer round, in which `inner` makes `inner_steps` steps with the given step size.
  """

  def step(game, policies, references, eta):
    round_game = game._replace(log_reference=references)

    def improve(i, carry):
      return inner.step(round_game, *carry, eta)

    first = (policies, inner.init(round_game, policies))
    policies, _ = jax.lax.fori_loop(0, inner_steps, improve, first)
    return policies, policies

  return Solver(lambda game, policies: game.log_reference, step, inner.schedule)


def _simple(move: Callable[..., Array], step_size: float) -> Solver:
  """A solver without memory that plays against itself: (log pi, q, log mu, eta) -> log pi'."""

  def step(game, policies, memory, eta):
    one = lambda p, q, r: move(p, q, r, eta)
    return jax.tree.map(one, policies, values(game, policies), game.log_reference), memory

  return Solver(_nothing, step, _constant(step_size))


def _extragradient(move: Callable[..., Array]) -> Callable:
  """The step of a solver that moves twice from the same policies; `move` as in `_simple`."""

  def step(game, policies, memory, eta):
    against = lambda opponents: jax.tree.map(
      lambda p, q, r: move(p, q, r, eta), policies, values(game, opponents), game.log_reference
    )
    return against(against(policies)), memory

  return step


# How far from an equilibrium -----------------------------------------------------------------------


def equilibrium(game: Game, tau: float, *, steps: int | None = None) -> Policies:
  """The log-policies of the regularised equilibrium, to the precision of the numbers.

  By Nash-MP, not by repeated best responses, which circle where tau is small. With step size 2 / R, for
  payoffs in an interval of length R, the KL to the equilibrium shrinks by 1 / (1 + 2 tau / R) a step.

  Args:
    game: the game; its payoffs are numbers, not traced arrays.
    tau: weight of the regulariser, above 0.
    steps: number of steps; None: enough to shrink the KL to exp(-40) of what it was.
  """
  step_size = 2 / max(float(jnp.ptp(game.payoff)), 1e-6)
  if steps is None:
    steps = int(40 / math.log1p(step_size * tau)) + 1
  return _mirror_prox(game, tau, step_size, steps)


@jax.jit
def _mirror_prox(game: Game, tau: float, step_size: float, steps: int) -> Policies:
  """The policies after Nash-MP from the references; one compiled program for all temperatures."""
  solver = nash_mp(tau)
  body = lambda i, policies: solver.step(game, policies, (), step_size)[0]
  return jax.lax.fori_loop(0, steps, body, game.log_reference)


@functools.partial(jax.jit, static_argnames='tau')
def duality_gap(game: Game, policies: Policies, tau: float = 0.0) -> Array:
  """What best responses would gain over the policies, summed over both players: [...], 0 at equilibrium.

      gap = sum over players of  max over p of [<q, p> - tau KL(p, mu)]  -  [<q, pi> - tau KL(pi, mu)]

  The maximum is tau log sum mu exp(q / tau), and max q at tau = 0. One policy that plays against
  itself is both players.

  Args:
    game: the game.
    policies: log-policies [..., n] of each player.
    tau: weight of the regulariser, 0 (default): the plain game.
  """

  def gain(policy, q, reference):
    policy, q, reference = jnp.broadcast_arrays(policy, q, reference)
    if tau:
      best = tau * jax.nn.logsumexp(reference + q / tau, axis=-1)
    else:
      best = jnp.max(q, axis=-1)
    return best - jnp.sum(jnp.exp(policy) * q, axis=-1) + tau * kl(policy, reference)

  gains = jax.tree.map(gain, policies, values(game, policies), game.log_reference)
  return sum(gains) * (2 / len(gains))


def exploitability(game: Game, policies: Policies) -> Array:
  """Half the duality gap of the plain game, [...]: with one player, max over y of P(y > pi) - 1/2."""
  return duality_gap(game, policies) / 2


@jax.jit
def kl(log_p: Array, log_q: Array) -> Array:
  """KL(p, q) in nats, [...], of log-probabilities [..., n]."""
  log_p, log_q = jnp.broadcast_arrays(log_p, log_q)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@jax.jit
def span(log_p: Array, log_q: Array) -> Array:
  """max log(p / q) - min log(p / q) in nats, [...]: it bounds the error of every action."""
  gap = jnp.subtract(*jnp.broadcast_arrays(log_p, log_q))
  return jnp.max(gap, axis=-1) - jnp.min(gap, axis=-1)


def _normalised(log_policy: Array) -> Array:
  return jax.nn.log_softmax(log_policy, axis=-1)


def _nothing(game: Game, policies: Policies) -> tuple:
  del game, policies
  return ()


def _constant(step_size: float) -> Schedule:
  return lambda step: step_size
