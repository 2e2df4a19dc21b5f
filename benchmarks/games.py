"""The exploitability curves of all solvers of preference games.

    python -m benchmarks.games              # writes docs/games.md and docs/games.png in a minute

Every solver of `polgrad/tabular/games.py` plays perturbed rock-paper-scissors, in float64, and 50 random
games of ten actions. What counts is the number of evaluations of the preferences: P(y > pi) of
all actions y is one, so a step of `nash_mp` or `egpo` costs two and a round of `comal` many.
"""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use('Agg')

import matplotlib.pyplot as plt

from polgrad.tabular import games

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
TAU = 0.1
EVALUATIONS = 10_000
SHOWN = (10, 100, 1000, 10_000)
ROCK_PAPER_SCISSORS = (np.array([[0, -3, 3], [3, 0, -1], [-3, 1, 0]]) + 3) / 6
START = (0.6, 0.2, 0.2)
INNER = 100  # evaluations of a round of COMAL


class Curve(NamedTuple):
  """A solver as the page shows it.

  Attributes:
    solver: with its step size.
    cost: evaluations of the preferences in a step.
    average: whether the average of the policies is measured, and not the last one.
  """

  solver: games.Solver
  cost: int = 1
  average: bool = False


# The plain game, measured by its exploitability.
PLAIN = {
  'multiplicative_weights': Curve(games.multiplicative_weights(0.5)),
  'multiplicative_weights, average': Curve(games.multiplicative_weights(0.5), average=True),
  'optimistic_weights': Curve(games.optimistic_weights(0.5)),
  'mmd, moving magnet': Curve(games.mmd(TAU, magnet_rate=0.05)),
  'comal': Curve(games.comal(games.nash_mp(TAU), inner_steps=INNER // 2), INNER),
}
# The regularised game, measured by its duality gap.
REGULARISED = {
  'best_response': Curve(games.best_response(TAU)),
  'nash_md, constant step': Curve(games.nash_md(TAU, schedule=lambda step: 0.5)),
  'nash_md': Curve(games.nash_md(TAU)),
  'nash_ema': Curve(games.nash_ema(TAU)),
  'mmd': Curve(games.mmd(TAU)),
  'inpo': Curve(games.inpo(TAU)),
  'egpo': Curve(games.egpo(TAU), 2),
  'nash_mp': Curve(games.nash_mp(TAU), 2),
}


def random_games(number: int, actions: int) -> games.Game:
  """Preferences sigmoid(A) with A antisymmetric and normal, seed 0."""
  noise = np.random.default_rng(0).normal(size=(number, actions, actions))
  return games.game(1 / (1 + np.exp(np.swapaxes(noise, 1, 2) - noise)))


def measure(game: games.Game, curve: Curve, tau: float, start: games.Policies) -> np.ndarray:
  """The gap [evaluations / cost + 1, ...] after each step; exploitability at tau = 0."""
  path = games.solve(game, curve.solver, steps=EVALUATIONS // curve.cost, start=start)
  policies = path.average if curve.average else path.last
  gap = games.duality_gap(game, policies, tau)
  return np.asarray(gap if tau else gap / 2)


def measure_all(curves: dict[str, Curve], tau: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """By name: the gaps in rock-paper-scissors, and the medians over random games."""
  rps, others = games.game(ROCK_PAPER_SCISSORS), random_games(50, 10)
  # Both start with most mass on one action.
  far = jnp.broadcast_to(jnp.log(jnp.array([0.55, *[0.05] * 9])), (50, 10))
  found = {}
  for name, curve in curves.items():
    own = measure(rps, curve, tau, (jnp.log(jnp.array(START)),))
    found[name] = own, np.median(measure(others, curve, tau, (far,)), axis=1)
  return found


PAGE = """# Games of preferences: which solver finds a policy that none beats

Made by `python -m benchmarks.games`, in 16 CPU seconds. Every number is exact: no sampling, no network.

A judge that compares two answers need not be consistent: A may beat B, B beat C, and C beat A. Then no
reward explains the judge, and "the best answer" has no meaning; a policy that no other policy beats
still exists, the *equilibrium* of the game in which two players answer and the judge decides. Nash-MD,
INPO, SPPO and DNO, for example, look for it with language models. `polgrad/tabular/games.py` has their
exact forms, where a policy is a table and P(y > pi), the chance that y beats the present policy, is
computed and not sampled.

    from polgrad.tabular import games

    game = games.game([[0.5, 0.0, 1.0], [1.0, 0.5, 1 / 3], [0.0, 2 / 3, 0.5]])
    path = games.solve(game, games.nash_mp(0.1), steps=100)
    games.duality_gap(game, path.last, 0.1)  # after each of the 100 steps

The game is rock-paper-scissors with wins of different sizes; its equilibrium is (1, 3, 3) / 7. The
*exploitability* of pi is max_y P(y > pi) - 1/2: what a player who knows pi wins beyond a draw. In the
*regularised* game both players also pay tau = {tau} times their KL to a uniform reference; its *duality
gap* is what both would win by their best responses. Both are 0 only at the equilibrium. All start from
{start}.

![exploitability and duality gap by evaluations of the preferences](games.png)

## The plain game: exploitability

{plain}

## The regularised game: duality gap at tau = {tau}

{regularised}

Columns are evaluations of P(. > pi). The last column is the median over 50 random games of ten
actions at {last} evaluations (P = sigmoid(A - A^T) with normal entries, seed 0), from a start with more
than half of the mass on one action. 0 is below 1e-12.

## What to read from it

* **The last policy of multiplicative weights gets worse.** It circles outwards, to one pure action after
  the other, so its exploitability swings up to 1/2; a column shows one point of a swing. Its average
  converges, but no method trains an average of networks. SPPO and DNO are this solver where
  preferences are exact: with an intransitive judge more iterations are not better.
* **Two things repair the last policy**: to count the last change twice (`optimistic_weights`), or to
  regularise. A regularised solver finds the equilibrium of the plain game if its reference follows:
  slowly (`mmd` with a moving magnet) or in rounds (`comal`).
* **Nash-MD needs its falling step size.** With a constant step it stops at a gap of {bias:.1e}: its
  mixture is the equilibrium of tau / (1 - eta tau). The schedule removes the bias and costs the
  linear rate.
* **`inpo` and `mmd` have no bias at a constant step**, if it is small enough to converge, and cost one
  evaluation a step. `nash_mp` has a step size that needs no tuning, at two evaluations each; `egpo` is
  the same with explicit steps, which are what gradient descent on its squared loss makes.
* **Repeated best responses circle** where tau is small. Do not use them to compute the equilibrium; use
  `games.equilibrium`.

## To add a solver

A solver is two pure functions and a default step size: `init` makes what it remembers, `step` returns
the next policies and memory. Policies are tuples of log-probabilities with one entry a player, so
`jax.tree.map` handles both kinds of games. This is fictitious play, whose policy is the average of the
best responses so far:

```python
import jax
import jax.numpy as jnp
from polgrad.tabular import games


def fictitious_play():
  def step(game, policies, memory, step_size):
    respond = lambda q: jax.nn.log_softmax(1e6 * q)
    mix = lambda p, q: jnp.logaddexp(p + jnp.log1p(-step_size), respond(q) + jnp.log(step_size))
    return jax.tree.map(mix, policies, games.values(game, policies)), memory

  return games.Solver(lambda game, policies: (), step, lambda step: 1 / (step + 2))


game = games.game([[0.5, 0.0, 1.0], [1.0, 0.5, 1 / 3], [0.0, 2 / 3, 0.5]])
last = games.solve(game, fictitious_play(), steps=1000).last
print(games.exploitability(game, last)[-1])
```

A test of its fixed point belongs into `tests/tabular/games_test.py`, and a row into `PLAIN` or
`REGULARISED` of `benchmarks/games.py`, which puts it on this page.

## Search at decision time

`polgrad/tabular/search.py` uses the same step once, in the state that has been reached: `rollout_values`
estimates q by rollouts that continue with a given policy, and `search_step` moves that policy. Without
a magnet it is for games of common interest, with one for games of opponents (arXiv:2304.13138).
"""


def table(found: dict[str, tuple[np.ndarray, np.ndarray]], curves: dict[str, Curve]) -> str:
  lines = [f'| solver | {" | ".join(map(str, SHOWN))} | random games |', '|---' * 6 + '|']
  for name, (own, others) in found.items():
    cells = [_number(own[n // curves[name].cost]) if n >= curves[name].cost else '' for n in SHOWN]
    lines.append(f'| {name} | {" | ".join(cells)} | {_number(others[-1])} |')
  return '\n'.join(lines)


def _number(x: float) -> str:
  return '0' if abs(x) < 1e-12 else f'{x:.3f}' if x >= 0.01 else f'{x:.1e}'


def draw(plain: dict, regularised: dict) -> None:
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout='constrained')
  panels = (
    (axes[0], plain, PLAIN, 'plain game: exploitability'),
    (axes[1], regularised, REGULARISED, f'regularised game (tau {TAU}): duality gap'),
  )
  for axis, found, curves, title in panels:
    for name, (own, _) in found.items():
      steps = np.arange(len(own)) * curves[name].cost
      # The steps that a logarithmic axis can tell apart.
      at = np.unique(np.geomspace(1, len(own) - 1, 300).astype(int))
      axis.plot(steps[at], np.maximum(own[at], 1e-13), lw=1.6, label=name)
    axis.set(xscale='log', yscale='log', ylim=(1e-12, 2), xlabel='evaluations of the preferences')
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc='lower left')
  figure.savefig(DOCS / 'games.png', dpi=110)
  plt.close(figure)


def main() -> None:
  with jax.enable_x64(True):
    plain, regularised = measure_all(PLAIN, 0.0), measure_all(REGULARISED, TAU)
  draw(plain, regularised)
  page = PAGE.format(
    tau=TAU,
    start=START,
    plain=table(plain, PLAIN),
    regularised=table(regularised, REGULARISED),
    last=f'{EVALUATIONS:,}',
    bias=regularised['nash_md, constant step'][0][-1],
  )
  (DOCS / 'games.md').write_text(page)


if __name__ == '__main__':
  main()
