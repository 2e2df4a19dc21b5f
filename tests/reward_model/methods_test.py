"""Reward models from arrays: each loss against its equation, and what a loss cannot see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import methods
from polgrad.losses import preference_losses
from polgrad.reductions import CalibrationError, merged
from tests import examples

ROWS, LENGTH = 8, 6
X = examples.batch()  # rows 4 and 5 have no tokens
MASK = np.asarray(X.mask)
VALUES = np.random.default_rng(3).normal(size=(ROWS, LENGTH))
MARGINS = np.repeat([0.5, -0.2, 3.0, 0.1], 2)
LABEL = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.7, 0.3])


def sure(z):
  return 1 / (1 + np.exp(-z))


def scores(values):
  """The entry of the last token in the mask; NaN in a row without tokens."""
  return np.array([x[np.flatnonzero(m)[-1]] if m.any() else np.nan for x, m in zip(values, MASK)])


def pairs(values):
  """(score of the better row, of the other, probability of that, margin) of each pair that counts."""
  for (a, b), label, margin in zip(scores(values).reshape(-1, 2), LABEL[::2], MARGINS[::2]):
    if np.isfinite(a + b):
      yield (a, b, label, margin) if label >= 0.5 else (b, a, 1 - label, margin)


def soft(link, z, p):
  return p * link(z) + (1 - p) * link(-z)


def bradley_terry(values):
  """Equation of the docstring, with every term that there is."""
  logistic = lambda z: -np.log(sure(z))
  terms = [
    soft(logistic, w - l - m, p * 0.9 + (1 - p) * 0.1)
    + 0.3 * (w + l) ** 2
    + 0.2 * np.mean([-np.log(5 - s) - np.log(s + 5) for s in (w, l)])
    for w, l, p, m in pairs(values)
  ]
  return np.mean(terms)


def focal(values):
  link = lambda z: (1 - 2 * max(sure(z) - 0.5, 0)) ** 2 * -np.log(sure(z))
  return np.mean([soft(link, w - l, p) for w, l, p, _ in pairs(values)])


def plain(values):
  return np.mean([soft(lambda z: -np.log(sure(z)), w - l, p) for w, l, p, _ in pairs(values)])


def regression(values):
  found = scores(values)
  where = np.isfinite(found)
  return np.mean((0.5 * (found - np.arange(ROWS)) ** 2)[where])


CASES = {
  'bradley_terry': (
    methods.bradley_terry(centering=0.3, barrier=0.2, margin_field='margin', label_smoothing=0.1),
    bradley_terry,
  ),
  'focal': (methods.bradley_terry(focal=True), focal),
  'pairwise_preference': (methods.pairwise_preference(), plain),
  'polar': (methods.polar(), plain),
  'reward_regression': (methods.reward_regression(target_field='score'), regression),
}


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_are_those_of_the_equation(name, x64):
  method, oracle = CASES[name]

  def loss(values):
    arrays = dict(values_after=values, label=LABEL, annotated_margin=MARGINS, target=np.arange(8.0))
    return method.loss(mask=MASK, logp=np.zeros(MASK.shape), **arrays)[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(VALUES)
  np.testing.assert_allclose(value, oracle(VALUES), rtol=1e-9)
  steps = 1e-5 * np.eye(VALUES.size).reshape(-1, *VALUES.shape)
  wanted = [(oracle(VALUES + e) - oracle(VALUES - e)) / 2e-5 for e in steps]
  np.testing.assert_allclose(gradient.reshape(-1), wanted, atol=1e-8)


def loss_of(values, **knobs):
  method = methods.bradley_terry(**knobs)
  return method.loss(mask=MASK, logp=jnp.zeros(MASK.shape), values_after=values, label=LABEL)[0]


def test_a_constant_changes_nothing_but_the_centering():
  @jax.jit
  def read(c):
    # The gradient by the constant is zero exactly where the mean of a pair's scores is.
    by_shift = jax.grad(lambda c: loss_of(VALUES * 0 + c, centering=0.01))
    return loss_of(VALUES + c), by_shift(c)

  (low, at_zero), (high, above) = read(0.0), read(1.0)
  np.testing.assert_allclose(low, high, rtol=1e-5)
  np.testing.assert_allclose([at_zero, above], [0.0, 0.01 * 8], atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def fitted(logit, start):
  """The least cross-entropy of a triple, of which each beats the next with probability 0.9."""
  first, second = np.array([0, 1, 2]), np.array([1, 2, 0])
  loss = lambda x: jnp.mean(preference_losses.logistic(logit(x, first, second), jnp.full(3, 0.9)))
  step = lambda x, _: (x - 2.0 * jax.grad(loss)(x), ())
  found, _ = jax.lax.scan(step, start, length=2000)
  return loss(found)


def test_a_score_of_both_completions_learns_an_intransitive_triple_and_one_of_each_cannot():
  start = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
  both = fitted(lambda s, i, j: s[j, i] - s[i, j], start)  # what was read first, then the other
  alone = fitted(lambda s, i, j: s[i] - s[j], start[0])
  np.testing.assert_allclose(both, 0.325083, atol=1e-5)
  np.testing.assert_allclose(alone, np.log(2), atol=1e-5)


def test_the_best_score_of_polar_is_the_mutual_information_of_two_samples(x64):
  pool = np.random.default_rng(0).dirichlet(np.ones(5), size=4)  # four policies, five completions
  same = np.mean(pool[:, :, None] * pool[:, None, :], axis=0)  # (y_ref, y) of one policy
  alone = pool.mean(axis=0)
  best = np.log(same / (alone[:, None] * alone[None]))

  def expected(r, joint):
    """joint[y_ref, y, y']: y_ref and y of one policy, y' of the other."""
    gaps = r[:, :, None] - r[:, None, :]
    return jnp.sum(joint * preference_losses.logistic(gaps, jnp.ones_like(gaps)))

  independent = same[:, :, None] * alone[None, None]
  others = (pool.sum(axis=0) - pool) / 3  # of a policy that is another one
  different = np.einsum('ka,kb,kc->abc', pool, pool, others) / 4
  largest = lambda joint: np.abs(jax.grad(expected)(best, joint)).max()
  assert largest(independent) < 1e-15
  assert largest(different) > 1e-3


def test_calibration_merges_exactly_and_is_that_of_the_bins():
  rng = np.random.default_rng(1)
  confidence, outcome = 0.5 + 0.5 * rng.random(50), (rng.random(50) < 0.6) * 1.0
  where = rng.random(50) < 0.8
  error = 0.0
  for low in np.arange(10) / 20 + 0.5:
    inside = where & (confidence >= low) & (confidence < low + 0.05)
    error += abs(np.sum((confidence - outcome)[inside])) / where.sum()

  @jax.jit
  def values(confidence, outcome, where):
    cut = lambda s: CalibrationError.of(confidence[s], outcome[s], where[s])
    whole, parts = cut(slice(None)), merged([cut(slice(0, 7)), cut(slice(7, 50))])
    nothing = CalibrationError.of(confidence, outcome, where & False)
    return whole.value(), parts.value(), nothing.value()

  np.testing.assert_allclose(values(confidence, outcome, where), [error, error, 0], rtol=1e-5)


def test_the_metrics_say_how_right_and_how_sure_the_model_is():
  arrays = dict(values_after=VALUES, label=LABEL, logp=np.zeros(MASK.shape))
  _, found = jax.jit(functools.partial(methods.bradley_terry().loss, mask=MASK))(**arrays)
  known = list(pairs(VALUES))
  brier = np.mean([(sure(w - l) - p) ** 2 for w, l, p, _ in known])
  np.testing.assert_allclose(found['brier'], brier, rtol=1e-5)
  gaps = np.array([w - l for w, l, _, _ in known])
  np.testing.assert_allclose(found['accuracy'], np.mean(gaps > 0), rtol=1e-6)
  error, right = 0.0, np.array([p if w > l else 1 - p for w, l, p, _ in known])
  bins = np.floor(20 * (sure(np.abs(gaps)) - 0.5))
  for one in set(bins):
    error += abs(np.sum((sure(np.abs(gaps)) - right)[bins == one])) / len(gaps)
  np.testing.assert_allclose(found['calibration_error'], error, rtol=1e-5)
  assert 'entropy' not in found
