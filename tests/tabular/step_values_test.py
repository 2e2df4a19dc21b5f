"""The noise of step values is exact: against the framework, a simulation, and the page that shows it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import step_values
from benchmarks import tiny_world as world
from polgrad import credit
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.objectives import PolicyGradient
from polgrad.tabular import enumerable
from polgrad.tabular.estimators import Setting, gradient_distributions

PAGE = pathlib.Path(__file__).parent.parent.parent / 'docs/trees.md'


@pytest.fixture(scope='module')
def one():
  with jax.enable_x64(True):
    return step_values.make()


def test_gradients_with_step_values_are_unbiased_whatever_their_number(one, x64):
  logits = world.trajectory()[-1]
  objective = lambda x: enumerable.objective(world.POLICY, x, jnp.asarray(world.REWARDS))
  true = np.asarray(jax.grad(objective)(logits)).ravel()
  found = [step_values.vines(one, 1), step_values.vines(one, np.inf), step_values.rloo(one, 4)]
  for gradient in found:
    np.testing.assert_allclose(gradient.mean, true, atol=1e-12)


def test_noise_of_exact_values_is_that_of_the_estimator(one, x64):
  """Of groups of two rows, credited and differentiated as in a run."""
  live = jnp.asarray(world.trajectory()[-1])
  setting = Setting(
    policy=world.POLICY,
    rewards=world.REWARDS,
    params=live,
    behavior=live,
    anchors={},
    values=world.values_of('vineppo', {}, np.asarray(live)),
  )
  objective = PolicyGradient(surrogate=surrogates.reinforce, aggregation=aggregation.sequence_sum)
  pairs = {
    credit.step_values(): step_values.vines(one, np.inf, 2),
    credit.outcome(advantage=advantages.leave_one_out): step_values.rloo(one, 2),
  }
  for estimator, want in pairs.items():
    (found,) = gradient_distributions([setting], estimator, objective, rows_per_prompt=2, chunk=225)
    np.testing.assert_allclose(found.mean, want.mean, atol=1e-12)
    noise = np.sqrt(found.variance) / np.linalg.norm(found.mean)
    assert noise == pytest.approx(want.noise, rel=1e-9)


def test_noise_of_few_completions_is_that_of_a_simulation(one):
  """Estimates of values are drawn, and rows with equal prefixes share them."""
  random, groups, rows, samples = np.random.default_rng(0), 40_000, 2, 3
  policy, lengths = world.POLICY, world.POLICY.mask.sum(axis=1)
  drawn = random.choice(len(one.probability), p=one.probability, size=(groups, rows))
  estimates = random.binomial(samples, one.values, size=(groups, len(one.values))) / samples
  total = np.zeros((groups, one.steps.shape[-1]))
  for row in drawn.T:
    for t in range(policy.tokens.shape[1]):
      here = policy.mask[row, t]
      value = np.take_along_axis(estimates, policy.prefixes[row, t][:, None], axis=1)[:, 0]
      later = policy.prefixes[row, min(t + 1, 2)][:, None]
      following = np.where(
        t + 1 < lengths[row],
        np.take_along_axis(estimates, later, axis=1)[:, 0],
        world.REWARDS[row],
      )
      total += (here * (following - value))[:, None] * one.steps[row, t] / rows
  want = step_values.vines(one, samples, rows)
  noise = np.sqrt(total.var(axis=0).sum()) / np.linalg.norm(want.mean)
  assert noise == pytest.approx(want.noise, rel=0.02)
  np.testing.assert_allclose(total.mean(axis=0), want.mean, atol=4 * total.std() / groups**0.5)


def test_the_page_has_the_table(x64):
  assert step_values.table() in PAGE.read_text(), 'run `python -m benchmarks.step_values`'
