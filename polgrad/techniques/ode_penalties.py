"""A Runge-Kutta solver whose error estimates and stiffness are penalties (arXiv:2105.03918).

A neural ODE x' = f(x, t) that is easy to solve needs fewer steps. The solver already estimates its error
and the stiffness in every step, so both can be penalised while the field f is trained.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

Field = Callable[[Array, Array], Array]  # (x [D], t []) -> slope [D]
sg = jax.lax.stop_gradient


class Tableau(NamedTuple):
  """An explicit Runge-Kutta pair whose last stage is at the end of the step."""

  stages: tuple[
    tuple[float, ...], ...
  ]  # coefficients of earlier slopes; the last row makes the step
  times: tuple[float, ...]  # of the stages
  error: tuple[float, ...]  # coefficients of the estimated error
  order: int
  stability: float  # size of the stability region, which scales stiffness


BOGACKI_SHAMPINE = Tableau(
  ((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
  (0, 1 / 2, 3 / 4, 1),
  (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
  order=3,
  stability=2.5127,
)
TSITOURAS = Tableau(
  (
    (),
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (
      *(5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401),
      -0.028269050394068383,
    ),
    (
      *(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081),
      2.324710524099774,
    ),
  ),
  (0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
  (
    *(-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995),
    *(-0.1447110071732629, 0.5823571654525552, -0.45808210592918697, 1 / 66),
  ),
  order=5,
  stability=3.5068,
)


class Steps(NamedTuple):
  """What the solver met; J tried steps, of which only accepted ones count."""

  error: Array  # [J], E_j, the estimated error by its tolerance
  stiffness: Array  # [J], S_j
  size: Array  # [J], h_j, detached
  accepted: Array  # bool[J]


class Solution(NamedTuple):
  """The end of a solve."""

  x: Array  # [D]
  steps: Steps
  finished: Array  # bool[], whether the end was reached within the tried steps


def _norm(x: Array) -> Array:
  """Euclidean norm whose gradient at 0 is 0."""
  square = jnp.sum(x**2)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _try(field: Field, x: Array, t: Array, h: Array, tableau: Tableau, rtol: float, atol: float):
  """One step: the next point, its error E and stiffness S."""
  points, slopes = [], []
  for weights, time in zip(tableau.stages, tableau.times):
    point = x + h * sum((w * k for w, k in zip(weights, slopes)), jnp.zeros_like(x))
    points.append(point)
    slopes.append(field(point, t + time * h))
  error = h * sum(e * k for e, k in zip(tableau.error, slopes))
  scale = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(points[-1]))
  relative = _norm(error / scale) / x.size**0.5
  moved = _norm(points[-1] - points[-2])
  turned = _norm(slopes[-1] - slopes[-2])
  stiffness = jnp.where(moved > 0, turned / jnp.where(moved > 0, moved, 1), 0)
  return points[-1], relative, stiffness


def solve(
  field: Field,
  x: Array,
  *,
  start: float = 0.0,
  end: float = 1.0,
  first_step: float = 0.1,
  max_steps: int = 64,
  adaptive: bool = True,
  tableau: Tableau = TSITOURAS,
  rtol: float = 1e-2,
  atol: float = 1e-2,
) -> Solution:
  """Solves x' = field(x, t) and keeps the error estimate and the stiffness of every step.

      E_j = rms( e_j / (atol + rtol max(|x_j|, |x_{j+1}|)) ),  e_j the embedded error estimate
      S_j = |k_s - k_{s-1}| / |g_s - g_{s-1}|,  k slopes and g points of the last two stages; 0 / 0 = 0

  A step is accepted if E_j <= 1; the next size is h 0.9 E_j^(-1/order), by a factor from 0.2 to 5. Sizes
  and acceptance have no gradient: the solver's steps are differentiated, its choices are not. For
  x' = -k x, S_j is k.

  Args:
    field: (x [D], t []) -> [D].
    x: [D], the start.
    start: time of `x`.
    end: later time.
    first_step: size of the first step, or of all steps without `adaptive`.
    max_steps: number of tried steps; all of them cost memory in the backward pass.
    adaptive: otherwise every step is accepted and has the size of the first.
    tableau: BOGACKI_SHAMPINE (orders 3 and 2) or TSITOURAS (5 and 4).
    rtol: error that is tolerated, by the size of x.
    atol: further error that is tolerated.

  Raises:
    ValueError: `end` is not after `start`, or the first step is not positive.
  """
  chex.assert_rank(x, 1)
  if not (end > start and first_step > 0):
    raise ValueError(f'{end=} must be after {start=}, and {first_step=} positive')
  scalar = lambda value: jnp.asarray(value, x.dtype)
  near = 10 * float(jnp.finfo(x.dtype).eps) * (abs(start) + abs(end))

  def step(carry, _):
    x, t, h = carry
    live = end - t > near
    # A finished solve tries steps of size 0, which change nothing.
    last = h >= end - t - near
    size = jnp.where(live, jnp.where(last, end - t, h), 0)
    moved, error, stiffness = _try(field, x, t, size, tableau, rtol, atol)
    accepted = live & ((sg(error) <= 1) if adaptive else True)
    x = jnp.where(accepted, moved, x)
    t = jnp.where(accepted, jnp.where(last, end, t + size), t)
    if adaptive:
      factor = 0.9 * jnp.maximum(sg(error), 1e-10) ** (-1 / tableau.order)
      h = jnp.where(live, size * jnp.clip(factor, 0.2, 5), h)
    return (x, t, h), Steps(error, stiffness, size, accepted)

  begin = (x, scalar(start), scalar(first_step))
  (x, t, _), steps = jax.lax.scan(step, begin, None, length=max_steps)
  return Solution(x, steps, end - t <= near)


def error_penalty(steps: Steps, *, reduce: Literal['mean', 'sum'] = 'mean') -> Array:
  """mean or sum over accepted steps of E_j |h_j|: -> [].

  Differences: the paper writes the sum, and the released code takes the mean, the default here.

  Confidence: CODE.

  >>> decay = solve(lambda x, t: -x, jnp.ones(1), first_step=0.25, max_steps=4, adaptive=False,
  ...               tableau=BOGACKI_SHAMPINE)
  >>> print(error_penalty(decay.steps, reduce='sum').round(4))
  0.01
  """
  total = jnp.sum(jnp.where(steps.accepted, steps.error * jnp.abs(steps.size), 0))
  return total if reduce == 'sum' else total / jnp.maximum(jnp.sum(steps.accepted), 1)


def stiffness_penalty(
  steps: Steps,
  *,
  reduce: Literal['max', 'mean', 'sum'] = 'max',
  stability: float = TSITOURAS.stability,
) -> Array:
  """The largest, mean or summed S_j / stability of the accepted steps: -> [].

  Differences: the paper writes the sum of S_j (reduce='sum', stability=1); the released code takes the
  maximum for ODEs and the mean for SDEs, divided by the size of the stability region.

  Confidence: CODE.
  """
  values = jnp.where(steps.accepted, steps.stiffness / stability, 0)
  if reduce == 'max':
    return jnp.max(values)
  return jnp.sum(values) / (1 if reduce == 'sum' else jnp.maximum(jnp.sum(steps.accepted), 1))


def annealed(step: Array, *, first: float, last: float, steps: float) -> Array:
  """The weight of a penalty, first exp(-step log(first / last) / steps): from `first` to `last`: -> [].

  The authors anneal weights of the error once an epoch, from 100 to 10 over 75 epochs of MNIST, for
  example; weights of stiffness (0.1 there) stay constant.

  >>> print(annealed(jnp.array(30.0), first=100.0, last=10.0, steps=75).round(4))
  39.8107
  """
  return first * jnp.exp(-step * jnp.log(first / last) / steps)
