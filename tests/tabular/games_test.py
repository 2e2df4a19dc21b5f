"""Solvers of preference games have the limits, rates and cycles that their papers state."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.tabular import games

# Perturbed rock-paper-scissors: wins and losses of different sizes, so the equilibrium is not uniform.
ROCK_PAPER_SCISSORS = (np.array([[0, -3, 3], [3, 0, -1], [-3, 1, 0]]) + 3) / 6
NASH = np.array([1, 3, 3]) / 7
# Regularised equilibria, from an independent implementation of magnetic mirror descent.
REGULARISED = {
  0.05: (0.151745, 0.467948, 0.380308),
  0.10: (0.173478, 0.486303, 0.340219),
  0.20: (0.223645, 0.477988, 0.298367),
  0.50: (0.298133, 0.413820, 0.288046),
}
SADDLE = np.array([[2.0, -1], [-1, 1]])  # equilibrium (.4, .6) of both players, value .2


@pytest.fixture
def rps(x64):
  return games.game(ROCK_PAPER_SCISSORS)


@pytest.fixture
def star(rps):
  return games.equilibrium(rps, 0.1)[0]


def log(*probabilities):
  return jnp.log(jnp.array(probabilities))


def shown(values, steps):
  return np.asarray(values)[list(steps)]


def random_games(number, actions=6):
  skew = np.random.default_rng(0).normal(size=(number, actions, actions))
  skew = skew - np.swapaxes(skew, 1, 2)
  return games.game(1 / (1 + np.exp(-skew)))


@pytest.mark.parametrize('tau', REGULARISED)
def test_the_equilibrium_of_perturbed_rock_paper_scissors(tau, rps):
  (found,) = games.equilibrium(rps, tau)
  np.testing.assert_allclose(np.exp(found), REGULARISED[tau], atol=1e-6)
  (q,) = games.values(rps, (found,))
  fixed = jax.nn.log_softmax(rps.log_reference[0] + q / tau)
  np.testing.assert_allclose(found, fixed, atol=1e-10)
  assert abs(games.duality_gap(rps, (found,), tau)) < 1e-12


def test_the_equilibrium_is_found_in_float32_too():
  (found,) = games.equilibrium(games.game(ROCK_PAPER_SCISSORS), 0.05)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(np.exp(found), REGULARISED[0.05], atol=2e-6)


def test_nash_mp_converges_linearly_in_kl_gap_and_span(rps, star):
  last = games.solve(rps, games.nash_mp(0.1), steps=40, start=log(0.98, 0.01, 0.01)).last
  at = (0, 1, 5, 10, 20, 40)
  kl = [2.78850, 2.05097, 0.476015, 0.0650349, 4.8937e-4, 1.8169e-8]
  gap = [0.9558, 0.8930, 0.1450, 0.05198, 4.879e-4, 1.78e-8]
  span = [5.616, 5.237, 2.500, 1.056, 0.0866, 5.45e-4]
  np.testing.assert_allclose(shown(games.kl(star, last[0]), at), kl, rtol=2e-5)
  np.testing.assert_allclose(shown(games.duality_gap(rps, last, 0.1), at), gap, rtol=2e-3)
  np.testing.assert_allclose(shown(games.span(last[0], star), at), span, rtol=1e-3)


def test_nash_mp_shrinks_the_kl_at_least_as_its_theorem_says(rps):
  observed = {0.01: 0.9713, 0.05: 0.8508, 0.1: 0.7355, 0.5: 0.3004, 1.0: 0.1370}
  start = (log(0.98, 0.01, 0.01),)
  run = jax.jit(lambda beta: games.solve(rps, games.nash_mp(beta), steps=60, start=start).last[0])
  for beta, largest in observed.items():
    (goal,) = games.equilibrium(rps, beta)
    kl = np.asarray(games.kl(goal, run(beta)))
    kl = kl[kl > 1e-10]
    ratio = np.max(kl[1:] / kl[:-1])
    assert ratio <= 1 / (1 + 2 * beta)
    assert ratio == pytest.approx(largest, abs=2e-3)


def test_nash_md_with_its_schedule_keeps_its_bound(rps, star):
  kl = np.asarray(games.kl(star, games.solve(rps, games.nash_md(0.1), steps=10_000).last[0]))
  steps = np.arange(1, 10_001)
  assert np.all(kl[1:] <= 8 / (0.1**2 * (steps + 1)))
  expected = [0.2905, 4.84e-4, 3.22e-5, 2.59e-7, 2.58e-9]
  np.testing.assert_allclose(kl[[1, 10, 100, 1000, 10_000]], expected, rtol=2e-3)


def test_nash_md_with_a_constant_step_finds_the_equilibrium_of_another_temperature(rps, star):
  tau, eta = 0.1, 0.5
  last = games.solve(rps, games.nash_md(tau), steps=1000, schedule=eta).last[0]
  np.testing.assert_allclose(np.exp(last[-1]), [0.169614, 0.494805, 0.335581], atol=1e-6)
  weight = eta * tau
  mixture = jax.nn.log_softmax((1 - weight) * last[-1] + weight * rps.log_reference[0])
  np.testing.assert_allclose(np.exp(mixture), [0.176140, 0.487057, 0.336803], atol=1e-6)
  (other,) = games.equilibrium(rps, tau / (1 - weight))
  np.testing.assert_allclose(mixture, other, atol=1e-10)
  # On the way each step obeys the theorem, whose additive term allows for the bias.
  kl = np.asarray(games.kl(star, last))
  assert np.all(kl[1:] <= (1 - weight) * kl[:-1] + 2 * eta**2)


def test_inpo_has_no_bias_at_a_constant_step(rps, star):
  run = lambda step_size: games.solve(rps, games.inpo(0.1), steps=3000, schedule=step_size).last[0]
  last = jax.jit(jax.vmap(run))(jnp.array([0.2, 1.0]))[:, -1]
  assert np.all(np.abs(games.kl(star, last)) < 1e-15)


@pytest.mark.parametrize(
  'solver', (games.nash_ema(0.1, decay=0.5), games.egpo(0.1)), ids=('nash_ema', 'egpo')
)
def test_other_regularised_solvers_have_the_same_limit(solver, rps, star):
  last = games.solve(rps, solver, steps=1000).last[0]
  np.testing.assert_allclose(last[-1], star, atol=1e-9)


def test_magnetic_mirror_descent_with_a_fixed_magnet(rps):
  run = lambda tau: games.solve(rps, games.mmd(tau), steps=10_000, schedule=tau).last[0][-1]
  last = jax.jit(jax.vmap(run))(jnp.array([*REGULARISED]))
  np.testing.assert_allclose(np.exp(last), [*REGULARISED.values()], atol=1e-6)


def test_magnetic_mirror_descent_with_a_moving_magnet_solves_the_plain_game(rps):
  last = games.solve(rps, games.mmd(0.1, magnet_rate=0.05), steps=20_000, schedule=0.1).last
  np.testing.assert_allclose(np.exp(last[0][-1]), NASH, atol=1e-6)
  assert games.exploitability(rps, last)[-1] < 5e-7


def test_multiplicative_weights_circle_outwards_while_their_average_converges(rps):
  path = games.solve(
    rps, games.multiplicative_weights(0.5), steps=20_000, start=(log(0.6, 0.2, 0.2),)
  )
  last = games.exploitability(rps, path.last)
  np.testing.assert_allclose(shown(last, (100, 1000, 20_000)), [0.3119, 0.4916, 0.49999], atol=1e-4)
  # Averages of the first 100, 1000, ... policies.
  average = shown(games.exploitability(rps, path.average), (99, 999, 9999, 19_999))
  np.testing.assert_allclose(average, [0.00639, 0.00653, 0.00183, 0.00135], atol=1e-5)


def test_optimistic_weights_converge_in_the_last_policy(rps):
  last = games.solve(
    rps, games.optimistic_weights(0.5), steps=10_000, start=(log(0.6, 0.2, 0.2),)
  ).last
  found = shown(games.exploitability(rps, last), (100, 1000, 10_000))
  np.testing.assert_allclose(found[:2], [0.0991, 0.00140], atol=3e-5)
  assert found[2] < 1e-6


def test_comal_approaches_the_equilibrium_of_the_plain_game(rps):
  solver = games.comal(games.nash_mp(0.1), inner_steps=200)
  last = games.solve(rps, solver, steps=20).last
  found = shown(games.exploitability(rps, last), (1, 2, 5, 10, 20))
  np.testing.assert_allclose(found, [0.0300, 0.0158, 0.00324, 9.5e-5, 2.3e-8], rtol=3e-2)
  np.testing.assert_allclose(np.exp(last[0][-1]), NASH, atol=1e-6)


def test_repeated_best_responses_circle(rps):
  last = np.exp(games.solve(rps, games.best_response(0.05), steps=60).last[0])
  assert {int(np.argmax(p)) for p in last[-6:]} == {0, 1, 2}
  assert np.min(np.max(last[-6:], axis=1)) > 0.95


def test_two_players_of_magnetic_mirror_descent_reach_the_quantal_response(x64):
  game = games.game(SADDLE, players=2)
  start = (log(0.9, 0.1), log(0.2, 0.8))
  firsts = {0.1: (0.408727, 0.392615), 1.0: (0.488674, 0.390938)}
  run = lambda alpha: games.solve(game, games.mmd(alpha), steps=5000, schedule=0.1, start=start)
  last = jax.jit(jax.vmap(lambda alpha: run(alpha).last))(jnp.array([*firsts]))
  for i, (alpha, expected) in enumerate(firsts.items()):
    found = tuple(x[i, -1] for x in last)
    np.testing.assert_allclose([np.exp(x)[0] for x in found], expected, atol=1e-6)
    rows, columns = games.values(game, found)
    np.testing.assert_allclose(found[0], jax.nn.log_softmax(rows / alpha), atol=2e-5)
    np.testing.assert_allclose(found[1], jax.nn.log_softmax(columns / alpha), atol=2e-5)
    exact = games.equilibrium(game, alpha)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, exact)


def test_hedge_and_optimistic_hedge_of_two_players(x64):
  game = games.game(SADDLE, players=2)
  start = (jax.nn.log_softmax(jnp.array([0.1, 0.0])), log(0.5, 0.5))
  plain = games.multiplicative_weights(0.1)
  # The first hint is 0 here, so the memory of the solver starts with zeros.
  optimistic = games.optimistic_weights(0.1)
  optimistic = optimistic._replace(init=lambda game, p: jax.tree.map(jnp.zeros_like, p))
  for solver, last, average in ((plain, 1.997, 0.0364), (optimistic, 2.4e-7, 0.0018)):
    path = games.solve(game, solver, steps=1999, start=start)
    assert games.duality_gap(game, path.last)[-1] == pytest.approx(last, rel=2e-2)
    assert games.duality_gap(game, path.average)[-1] == pytest.approx(average, rel=2e-2)


def test_dno_never_loses_against_the_policy_before(x64):
  game = random_games(200)

  @jax.jit
  def margins(step_size):
    last = games.solve(game, games.multiplicative_weights(), steps=5, schedule=step_size).last[0]
    (q,) = games.values(game, (last[:-1],))
    wins = jnp.sum(jnp.exp(last[1:]) * q, axis=-1)
    return wins - 0.5, games.kl(last[1:], last[:-1]) / step_size

  for step_size in (0.1, 1.0, 10.0):
    margin, least = margins(step_size)
    assert np.all(margin >= least - 1e-12)


def test_methods_that_reduce_to_each_other(x64):
  game = random_games(20)
  reference = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (20, 6)))
  game = game._replace(log_reference=(reference,))
  policies = (jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (20, 6))),)

  def move(solver, eta):
    first = lambda: solver.step(game, policies, solver.init(game, policies), eta)[0][0]
    return jax.jit(first)()

  q = games.values(game, policies)[0]
  tau = 0.3
  same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12)
  # INPO whose regulariser and step agree is IPO: the reference moved by the preferences.
  same(move(games.inpo(tau), 1 / tau), jax.nn.log_softmax(reference + q / tau))
  # Nash-MD of the largest step forgets the policy: the best response to the reference.
  against = games.values(game, game.log_reference)[0]
  same(move(games.nash_md(tau), 1 / tau), jax.nn.log_softmax(reference + against / tau))
  # Magnetic mirror descent towards the reference, made explicit, is INPO.
  same(games.mirror_step(policies[0], q, 0.5, tau, reference), move(games.inpo(tau), 0.5))
  # Without a regulariser all are multiplicative weights, which is where SPPO's loss is zero.
  plain = move(games.multiplicative_weights(), 0.5)
  same(move(games.inpo(0.0), 0.5), plain)
  same(move(games.mmd(0.0), 0.5), plain)
  sppo = plain - policies[0] - 0.5 * q
  same(sppo, jnp.broadcast_to(sppo[:, :1], sppo.shape))
  # The average of Nash-EMA without memory is the policy itself.
  same(move(games.nash_ema(tau, decay=0.0), 0.5), move(games.inpo(tau), 0.5))


def test_payoffs_of_one_policy_against_itself_are_probabilities():
  for payoff in (SADDLE, SADDLE[:1]):
    with pytest.raises(ValueError, match=r'must be 1 .*players=2'):
      games.game(payoff)


def test_the_page_shows_every_solver_and_its_example_runs(capsys):
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'games.md').read_text()
  rows = set(re.findall(r'^\| (\w+)[^|]* \|', page, re.MULTILINE))
  solvers = {name for name in dir(games) if _returns_a_solver(getattr(games, name))}
  assert solvers and solvers <= rows
  (block,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  indented = re.findall(r'^ {4}(\S.*\n)', page.split('```')[0], re.MULTILINE)
  block = ''.join(indented) + block
  assert 'games.nash_mp' in block
  with jax.numpy_rank_promotion('raise'):
    exec(compile(block, 'docs/games.md', 'exec'), {})
  assert float(capsys.readouterr().out) < 0.05


def _returns_a_solver(thing) -> bool:
  public = not getattr(thing, '__name__', '_').startswith('_')
  return public and getattr(thing, '__annotations__', {}).get('return') is games.Solver
