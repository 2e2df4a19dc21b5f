"""Published numbers and identities of losses of single rows, of lists and of the best of n."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import methods, objectives
from polgrad.losses import (
  best_of_n,
  denoising,
  listwise,
  pointwise,
  preference_losses,
  self_improvement,
)
from polgrad.types import Batch, Outputs

# Row log-ratios of a pair whose margin is 0: policy less reference.
DW, DL = np.array([-10.0 + 9.0]), np.array([-12.0 + 11.0])
ONE, ZERO = np.ones(1), np.zeros(1)
PAIR = np.zeros(2, np.int32)


@pytest.fixture(autouse=True)
def in_float64(x64):
  """All numbers here are exact to many digits."""


def test_published_numbers_of_one_pair():
  z0 = jnp.array(0.1 * 0.5)
  kto = [pointwise.kto(0.1 * d, y, z0)[0] for d, y in ((DW, ONE), (DL, ZERO))]
  apo = sum(pointwise.sigmoid(0.1 * d, y)[0] for d, y in ((DW, ONE), (DL, ZERO)))
  sppo = sum(pointwise.squared(d, y, target=5.0)[0] for d, y in ((DW, ONE), (DL, ZERO))) / 2
  np.testing.assert_allclose([*kto, apo, sppo], [0.537430, 0.462570, 1.0, 26], atol=1e-6)


def test_with_a_reference_point_of_zero_kto_is_unpaired_apo_zero():
  z, p = jnp.linspace(-2, 2, 5), jnp.array([1.0, 0, 1, 0, 0.3])
  np.testing.assert_array_equal(pointwise.kto(z, p, jnp.array(0.0)), pointwise.sigmoid(z, p))


def test_of_two_completions_infonca_and_mc_po_are_dpo():
  score, rewards = jnp.array([0.65, -0.2]), jnp.array([1.0, 0.0])
  dpo = preference_losses.logistic(score[:1] - score[1:], ONE)[0]
  infonca = listwise.infonca(score, rewards, PAIR).sum()
  mc_po = listwise.hard_negatives(score, rewards, PAIR, jnp.array([0.5, 0.5])).sum()
  np.testing.assert_allclose([infonca, mc_po], dpo, rtol=1e-12)


def test_the_published_value_of_nca():
  """Two completions with one-hot rewards at r = (0.65, -0.2)."""
  loss = listwise.nca(jnp.array([0.65, -0.2]), jnp.array([1.0, 0.0]), PAIR).sum()
  assert loss == pytest.approx(1.254152, abs=1e-6)


REWARDS = np.array([0.3, 1.0, -0.5, 0.1])
LIST = np.zeros(4, np.int32)


def gradient(loss, score, **knobs):
  return jax.grad(lambda r: loss(r, REWARDS, LIST, **knobs).sum())(score)


def test_the_optimum_of_nca_is_absolute():
  p = jax.nn.softmax(REWARDS / 0.4)
  np.testing.assert_allclose(gradient(listwise.nca, jnp.log(4 * p), alpha=0.4), 0, atol=1e-12)
  assert abs(gradient(listwise.nca, jnp.log(4 * p) + 1, alpha=0.4)).max() > 0.1


@pytest.mark.parametrize('loss', [listwise.infonca, listwise.exo])
def test_lists_are_fitted_where_differences_of_scores_are_those_of_rewards(loss):
  fitted = REWARDS / 0.4 + 3.0
  np.testing.assert_allclose(gradient(loss, fitted, alpha=0.4), 0, atol=1e-12)
  if loss is listwise.exo:
    assert loss(fitted, REWARDS, LIST, alpha=0.4).sum() == pytest.approx(0, abs=1e-12)
  moved = fitted + jnp.array([1.0, 0, 0, 0])
  assert gradient(loss, moved, alpha=0.4)[0] > 0.01


@pytest.mark.parametrize('eps', [0.001, 0.2])
def test_exo_of_two_completions_has_the_published_gradient(eps):
  """sigmoid(z) sigmoid(-z) (z - log((1 - eps) / eps)) by the difference z of the scores."""
  odds = np.log((1 - eps) / eps)
  rewards = jnp.array([odds, 0.0])  # p = (1 - eps, eps)
  loss = lambda z: listwise.exo(jnp.stack([z, 0.0]), rewards, PAIR, alpha=1.0).sum()
  for z in (-1.0, 0.5, odds):
    sigmoid = 1 / (1 + np.exp(-z))
    expected = sigmoid * (1 - sigmoid) * (z - odds)
    assert jax.grad(loss)(z) == pytest.approx(expected, abs=1e-12)


def test_hard_negatives_are_drawn_by_the_policys_scores():
  """The other row with the score 2 is drawn with the probability e^2 / (e^2 + 1 + 1)."""
  score, rewards = jnp.array([0.0, 2.0, 0.0, 0.0]), jnp.array([1.0, 0, 0, 0])
  noise = jnp.asarray(np.random.default_rng(0).random((4000, 4)))
  loss = jax.vmap(lambda u: listwise.hard_negatives(score, rewards, LIST, u).sum())(noise)
  hard = jnp.logaddexp(0.0, 2.0)
  found = jnp.mean(jnp.isclose(loss, hard))
  assert found == pytest.approx(np.exp(2) / (np.exp(2) + 2), abs=0.02)
  everything = listwise.hard_negatives(score, rewards, LIST, noise[0], negatives=3).sum()
  assert everything == pytest.approx(listwise.infonca(score, rewards, LIST).sum())


def test_the_best_of_four_and_its_variational_form():
  p, rewards = jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.arange(4.0)
  law = best_of_n.law(p, rewards, n=4)
  np.testing.assert_allclose(law, [1e-4, 0.008, 0.1215, 0.8704], atol=1e-12)
  assert jnp.sum(law * jnp.log(law / p)) == pytest.approx(0.54046, abs=1e-5)
  assert best_of_n.kl_bound(4) == pytest.approx(0.63629, abs=1e-5)
  variational = best_of_n.variational_law(p, rewards, n=4)
  np.testing.assert_allclose(variational, [2.126e-4, 0.011482, 0.137784, 0.850521], atol=1e-6)
  # With ties, completions of equal reward share as the reference has them.
  tied = best_of_n.law(p, jnp.array([0.0, 1, 1, 1]), n=4)
  np.testing.assert_allclose(tied, [1e-4, *(p[1:] / 0.9 * (1 - 1e-4))], rtol=1e-12)


def test_without_atoms_the_kl_of_the_best_of_n_reaches_its_bound():
  count = 2000
  uniform = np.full(count, 1 / count)
  edges = np.arange(count + 1) / count
  law = np.diff(edges**4)
  assert np.sum(law * np.log(law / uniform)) == pytest.approx(best_of_n.kl_bound(4), abs=1e-5)


def test_best_of_n_rewards_and_margins():
  assert round(best_of_n.mean_margin(8), 2) == 18.15
  better = jnp.array([2, 1, 0])  # samples of the reference that are not better, of two
  found = best_of_n.log_quantile(better, jnp.full(3, 2))
  np.testing.assert_allclose(jnp.exp(found), [1, 2 / 3, 1 / 3], rtol=1e-6)
  found = best_of_n.worse_than_all(better, jnp.full(3, 2))
  np.testing.assert_allclose(found, [0, 0, -np.log(16)], rtol=1e-6)


def test_the_variational_best_of_n_maximises_its_objective():
  p, rewards, n = np.array([0.1, 0.2, 0.3, 0.4]), np.arange(4.0), 4
  pi = np.asarray(best_of_n.variational_law(jnp.asarray(p), jnp.asarray(rewards), n=n))
  f = np.cumsum(p)
  # d/d logits of -E[(n - 1) log F] + KL(pi, p), with log F in the place of its estimate.
  gain = (n - 1) * np.log(f) - np.log(pi / p)
  np.testing.assert_allclose(pi * (gain - pi @ gain), 0, atol=1e-7)


def test_bonbon_aims_at_the_mean_margin_of_the_best_of_n():
  """With continuous rewards log(pi_best / p) = log(n F^(n - 1)), so the margin is (n - 1) times the mean
  of log F(best) - log F(worst)."""
  n, rng = 8, np.random.default_rng(0)
  quantiles = rng.random((40_000, n))
  sampled = (n - 1) * np.log(quantiles.max(1) / quantiles.min(1)).mean()
  assert sampled == pytest.approx(best_of_n.mean_margin(n), rel=0.01)


def srpo_game(seed=0, n=4):
  rng = np.random.default_rng(seed)
  skew = rng.normal(size=(n, n))
  wins = 1 / (1 + np.exp(skew.T - skew))  # wins[a, b] = P(a > b)
  normal = lambda x: x - np.logaddexp.reduce(x, axis=0)
  return wins, normal(rng.normal(size=n)), normal(rng.normal(size=(n, n)))


def test_the_closed_forms_of_srpo_have_loss_zero_for_every_behaviour():
  """Pairs (y1, y2) of any distribution, labelled by P: both residuals vanish pair by pair."""
  beta, (wins, reference, in_context) = 0.3, srpo_game()
  # log pi'(y2 | y1) = log reference(y2 | y1) + P(y2 > y1) / beta - log Z(y1); columns are y1.
  log_z = np.logaddexp.reduce(in_context + wins / beta, axis=0)
  a = wins / beta - log_z
  u = -log_z - np.logaddexp.reduce(reference - log_z)
  one, two = np.triu_indices(len(u), 1)
  fitted = dict(u_w=u[one], u_l=u[two], a_ww=a[one, one], a_ll=a[two, two])
  np.testing.assert_allclose(self_improvement.robustness(**fitted, beta=beta), 0, atol=1e-12)
  soft = 0.5 + beta * (a - np.diag(a))
  np.testing.assert_allclose(soft, wins, atol=1e-12)


def test_hard_labels_do_not_move_the_optimum_of_srpo():
  """The gradient of the loss, in expectation over the winner, is 0 there for any law of the pairs."""
  beta, (wins, _, in_context) = 0.3, srpo_game(1)
  log_z = np.logaddexp.reduce(in_context + wins / beta, axis=0)
  a = jnp.asarray(wins / beta - log_z)
  u = jnp.asarray(-log_z)
  law = np.random.default_rng(2).dirichlet(np.ones(len(u) ** 2)).reshape(wins.shape)

  def expected(u, a):
    i, j = np.indices(wins.shape)
    scores = lambda w, l: (u[w], u[l], a[w, l], a[l, l], a[l, w], a[w, w])
    first = self_improvement.srpo(*scores(i, j), beta=beta, alpha=0.3)
    second = self_improvement.srpo(*scores(j, i), beta=beta, alpha=0.3)
    return jnp.sum(law * (wins * first + (1 - wins) * second))

  for found in jax.grad(expected, argnums=(0, 1))(u, a):
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_mapo_is_the_transcription_and_prefers_small_errors():
  chosen, rejected = np.array([0.0, 1e-6, 0.02, 0.3, 2.0]), np.array([0.0, 1e-2, 0.01, 0.1, 2.5])

  def transcribed(w, l, beta=0.1, s=0.5, t=1000):
    g = lambda e: s * e / (np.exp(s * e) - 1) if e > 1e-5 else 1 - s * e / 2
    return w - beta * -np.logaddexp(0, -t * (g(w) - g(l)))

  found = denoising.mapo(jnp.asarray(chosen), jnp.asarray(rejected))
  np.testing.assert_allclose(found, list(map(transcribed, chosen, rejected)), rtol=1e-5)
  same = denoising.mapo(jnp.array(0.3), jnp.array(0.3), beta=2.0)
  assert same == pytest.approx(0.3 + 2 * np.log(2))
  # The error of the chosen image falls, that of the rejected one rises; both are finite at 0.
  slopes = jax.vmap(jax.grad(denoising.mapo, argnums=(0, 1)))
  up, down = slopes(jnp.asarray(chosen), jnp.asarray(rejected))
  assert (up >= 1).all() and (down <= 0).all() and np.isfinite(up).all() and np.isfinite(down).all()
  np.testing.assert_allclose(jax.grad(denoising.odds)(0.0), -0.25, rtol=1e-6)
  assert jax.grad(denoising.odds)(2000.0) == 0  # exp(1000) is no number of 64 bits
  x = jnp.array([9.99e-4, 1.001e-3]) * 2  # both sides of where the series ends
  np.testing.assert_allclose(denoising.odds(x), x / 2 / np.expm1(x / 2), rtol=1e-12)


def rows_of(scores) -> tuple[Outputs, Batch]:
  """Rows of one token whose summed log-ratio is the score, labelled 1 and 0 in turns."""
  logp = jnp.asarray(scores)[:, None]
  rows = len(scores)
  batch = Batch(
    tokens=jnp.zeros((rows, 1), jnp.int32),
    segment_ids=jnp.ones((rows, 1), jnp.int32),
    mask=jnp.ones((rows, 1), bool),
    reference_logp=jnp.zeros((rows, 1)),
    label=jnp.arange(rows) % 2.0,
  )
  return Outputs(logp=logp), batch


def test_the_threshold_of_bco_is_the_mean_of_all_rows_so_far():
  _, objective = methods.bco(beta=0.5).bound()
  state, seen = objective.init(), []
  for scores, rows in (([1.0, 3.0], 2), ([2.0, -4.0], 1), ([0.5, 5.0], 2)):  # some have no tokens
    outputs, batch = rows_of(np.array(scores))
    batch = batch.replace(mask=jnp.arange(2)[:, None] < rows)
    seen += scores[:rows]
    _, metrics = objective.apply(outputs, batch, state, step=0)
    assert metrics['reference_point'].value() == pytest.approx(0.5 * np.mean(seen))
    state = objective.advance(state, metrics)


@pytest.mark.parametrize('method', [methods.kto(), methods.bco()], ids=['kto', 'bco'])
def test_the_reference_point_is_that_of_the_whole_batch_in_every_micro_batch(method):
  _, objective = method.bound()
  outputs, batch = rows_of(np.array([1.0, 3.0, -2.0, 6.0]))
  batch = batch.with_arrays(mismatched_log_ratio=jnp.array([4.0, jnp.nan, 2.0, 9.0]))
  state = objective.init()
  whole = objective.apply(outputs, batch, state, step=0)[1]['reference_point'].value()
  assert whole == pytest.approx(0.1 * 5 if 'kto' in repr(objective) else 0.01 * 2)
  found = objective.select(outputs, batch, state, step=0)
  batch = batch.replace(features=batch.features | found)
  for piece in (slice(0, 2), slice(2, 4)):
    part = jax.tree.map(lambda x, piece=piece: x[piece], (outputs, batch))
    assert objective.apply(*part, state, step=0)[1]['reference_point'].value() == whole


def test_a_prompt_with_one_row_is_left_out_of_a_list():
  objective = objectives.Listwise(score=lambda logp: logp[:, 0], loss=listwise.nca)
  outputs, batch = rows_of(np.array([0.65, -0.2, 0.3]))
  batch = batch.replace(rewards=jnp.array([1.0, 0, 1]), group_ids=jnp.array([0, 0, 1]))
  terms, metrics = objective.apply(outputs, batch, (), step=0)
  assert terms['pointwise'].count == 1 and metrics['accuracy'].value() == 1
  assert terms['pointwise'].value() == pytest.approx(1.254152, abs=1e-6)
