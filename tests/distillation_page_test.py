"""The page on distillation: its table, and published fixed points of a symmetric teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import distillation as page
from benchmarks import teacher_consistency
from polgrad import methods
from polgrad.losses import divergences
from polgrad.tabular import estimators


@pytest.fixture(scope='module')
def rows():
  return page.rows()


def test_the_page_has_the_table_that_its_command_makes(rows):
  assert page.page(rows) in page.PAGE.read_text()
  forward, reverse = rows['`forward_kl`'], rows['`reverse_kl`']
  # Covering: the student has mean and variance of the teacher. Seeking: it is the larger mode alone.
  with jax.enable_x64(True):
    both = np.asarray(jax.nn.softmax(page.teacher()))
    own = page.probabilities(np.array([forward.mean, np.log(forward.deviation)]))
  for power in (1, 2):
    np.testing.assert_allclose(own @ page.POINTS**power, both @ page.POINTS**power, rtol=1e-4)
  np.testing.assert_allclose(reverse.value, -np.log(0.6), rtol=1e-3)
  np.testing.assert_allclose([reverse.mean, reverse.deviation], [-2, 0.5], atol=1e-3)


@pytest.mark.parametrize(
  ('name', 'mean', 'deviation'),
  [
    ('`forward_kl`', 0, 2.062),
    ('`skew_forward_kl`, 0.1', 0, 2.054),
    ('`jensen_shannon`, w = 0.5', 0, 2.044),
    ('`jensen_shannon`, w = 0.1', 0, 2.060),
    ('`total_variation`', 1.758, 0.962),
    ('`reverse_kl`', 2, 0.5),
    ('`skew_reverse_kl`, 0.1', 2, 0.5),
  ],
)
def test_two_equal_modes_on_a_fine_grid(name, mean, deviation, monkeypatch):
  """A Gaussian fitted to 0.5 N(-2, 0.5) + 0.5 N(2, 0.5): covering has the standard deviation
  sqrt(4.25) = 2.062, seeking that of one mode."""
  monkeypatch.setattr(page, 'POINTS', np.linspace(-8, 8, 401))
  monkeypatch.setattr(page, 'MODES', ((-2.0, 0.5), (2.0, 0.5)))
  monkeypatch.setattr(page, 'STARTS', [(0.1, 1.5), (1.5, 0.7)])
  with jax.enable_x64(True):
    found = page.fixed_point(page.DIVERGENCES[name])
  np.testing.assert_allclose([abs(found.mean), found.deviation], [mean, deviation], atol=3e-3)
  if name == '`reverse_kl`':
    np.testing.assert_allclose(found.value, np.log(2), atol=1e-3)


def test_the_page_has_the_fixed_points_of_likelihoods_and_mixtures():
  found = page.likelihood_rows()
  assert page.likelihood_page(found) in page.PAGE.read_text()
  root = np.sqrt(page.FREQUENCIES)
  closed = {
    '`sft`': page.FREQUENCIES,
    '`dft`': [1, 0, 0],
    '`probability`, exponent 1/2': np.square(page.FREQUENCIES) / np.square(page.FREQUENCIES).sum(),
    '`undecided`, of `chord`': [2 / 3, 1 / 3, 0],  # 1 - C / q of the two that are left
    '`luffy`': 1.3 * root / root.sum() - 0.1,
  }
  for name, p in closed.items():
    np.testing.assert_allclose(found[name], p, atol=2e-4)
  for mu in (0.9, 0.5, 0.1):  # mu (q - p) + (1 - mu) p (r - p_3) = 0
    p = found[f'`chord`, weigh=alike, mu = {mu}']
    at_rest = mu * (page.FREQUENCIES - p) + (1 - mu) * p * (page.REWARDS - p[2])
    np.testing.assert_allclose(at_rest, 0, atol=1e-9)


def test_what_a_list_of_tokens_leads_to_and_that_it_is_what_top_k_compares(rows):
  """The minimum of KL + KL of the class of others, written in NumPy, has no gradient there."""
  top, told = rows["`top_k`, the teacher's 8"], rows['`listed`, 8']
  np.testing.assert_allclose(told, top, rtol=1e-9)
  t = np.exp(page.teacher()) / np.exp(page.teacher()).sum()
  best = np.argsort(-t)[: page.K]

  def loss(mean, deviation):
    s = np.exp(-0.5 * ((page.POINTS - mean) / deviation) ** 2)
    s = s / s.sum()
    classes = [np.append(p[best], 1 - p[best].sum()) for p in (t, s)]
    return classes[0] @ np.log(classes[0] / classes[1])

  at = lambda dm, dd: loss(top.mean + dm, top.deviation + dd)
  np.testing.assert_allclose(at(0, 0), top.value, rtol=1e-6)
  slopes = [at(1e-4, 0) - at(-1e-4, 0), at(0, 1e-4) - at(0, -1e-4)]
  np.testing.assert_allclose(np.array(slopes) / 2e-4, 0, atol=1e-4)


def test_the_students_of_gkd_rest_where_the_page_says():
  """The expected gradient of the method, by enumeration, on both kinds of text."""
  found = page.text_rows()
  assert page.text_page(found) in page.PAGE.read_text()
  with jax.enable_x64(True):
    teacher = jnp.asarray(page.wordy_teacher())
    for fraction, params in page.text_rest(divergences.jensen_shannon).items():
      own = jnp.asarray(params[page.LAST])
      one = estimators.Setting(
        policy=page.TEACHER,
        rewards=np.zeros(27),
        params=own,
        behavior=own,
        anchors={'teacher': teacher},
        values=np.zeros((27, 3)),
      )
      both = [one, one._replace(behavior=teacher)]
      parts = methods.gkd(student_fraction=fraction).bound()
      on_own, on_given = estimators.gradient_distributions(both, *parts, rows_per_prompt=1)
      mean = fraction * on_own.mean + (1 - fraction) * on_given.mean
      np.testing.assert_allclose(np.eye(4)[page.LAST].T @ mean.reshape(13, 3), 0, atol=1e-12)
      assert np.abs(mean).max() > 1e-3  # a student of whole prefixes would move
  # Forward KL on the teacher's text is supervised learning: the smallest KL(T, S) of all.
  assert min(found, key=lambda key: found[key].forward) == ('`forward_kl`', 0.0)


def test_a_student_that_can_be_the_teacher_becomes_it():
  with jax.enable_x64(True):
    for divergence in (divergences.skew_reverse_kl, divergences.jensen_shannon):
      assert page.free(divergence) < 1e-4


def test_stored_completions_lead_to_the_teacher_whose_text_the_student_was_tuned_on():
  found = teacher_consistency.rows()
  assert teacher_consistency.page(found) in page.PAGE.read_text()
  last = {key: values[-1] for key, values in found.items()}
  for kind in teacher_consistency.WEIGHTS:
    assert last['A', kind] < 2e-3
  assert last['B', 'fresh'] < 1e-3 < last['B', 'frozen, all']
  assert last['B', 'frozen, 64'] > 100 * last['A', 'frozen, 64']
