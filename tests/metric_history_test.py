"""Controllers: coefficients of penalties that follow a metric from update to update."""

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import metric_history, objectives
from polgrad.losses import aggregation, penalties, selections, surrogates, weights
from polgrad.reductions import Mean
from polgrad.registry import Weighted, bind, part, weighted
from polgrad.types import Batch, Outputs

MASK = jnp.array([[True, True, True], [True, False, False]])
BATCH = Batch(
  tokens=jnp.zeros((2, 3), jnp.int32),
  segment_ids=jnp.ones((2, 3), jnp.int32),
  mask=MASK,
  group_ids=jnp.array([0, 1]),
  advantages=jnp.array([[1.0, 1, 1], [-2, 0, 0]]),
  proximal_logp=jnp.full((2, 3), -1.0),
  behavior_logp=jnp.array([[-1.0, -4.0, -1.0], [-1.0, 0, 0]]),
  reference_logp=jnp.full((2, 3), -1.5),
)
OUTPUTS = Outputs(logp=jnp.full((2, 3), -1.0), entropy=jnp.full((2, 3), 0.4))


def metric(value):
  return {'kl': Mean(total=jnp.float32(value * 7), count=jnp.float32(7))}


def path(history, values):
  state, found = history.init(), []
  for value in values:
    state = history.advance(state, metric(value))
    found.append(float(history.value(state)))
  return found


def test_the_kl_coefficient_moves_by_the_relative_error_which_is_limited():
  control = metric_history.adaptive_kl(target=0.06, initial=1.0, rate=256 / 10_000)
  np.testing.assert_allclose(path(control, [0.12]), [1.00512], rtol=1e-6)
  beta, expected = 1.0, []
  for kl in (0.06, 0.066, 0.0, 5.0):
    beta *= 1 + 0.0256 * np.clip(kl / 0.06 - 1, -0.2, 0.2)
    expected.append(beta)
  np.testing.assert_allclose(path(control, [0.06, 0.066, 0.0, 5.0]), expected, rtol=1e-6)


def test_the_entropy_coefficient_integrates_the_error_between_its_bounds():
  control = metric_history.entropy_control(
    metric='kl', target=0.5, initial=0.1, rate=0.2, largest=0.15
  )
  np.testing.assert_allclose(path(control, [0.5, 0.4, 0.0, 2.0]), [0.1, 0.12, 0.15, 0], atol=1e-7)


def objective_of(**slots):
  return objectives.PolicyGradient(
    surrogate=surrogates.importance_weighted, aggregation=aggregation.token_mean, **slots
  )


def terms_of(objective, state=None, step=0):
  state = objective.init() if state is None else state
  return objective.apply(OUTPUTS, BATCH, state, step=step)


def test_a_controller_multiplies_its_penalty_and_follows_its_metric():
  objective = objective_of(
    penalties={'kl': Weighted(2.0, penalties.k2)},
    schedules={'kl': metric_history.kl_coefficient},
    history={'kl_coefficient': metric_history.adaptive_kl(target=0.1, initial=0.5, rate=1.0)},
  )
  state = objective.init()
  terms, metrics = terms_of(objective, state)
  np.testing.assert_allclose(terms['kl'].value(), 2 * 0.5 * 0.5**2 / 2)
  np.testing.assert_allclose(metrics['kl'].value(), 0.125)
  state = objective.advance(state, metrics)
  terms, _ = terms_of(objective, state, step=1)
  np.testing.assert_allclose(terms['kl'].value(), 2 * 0.5 * 1.2 * 0.125, rtol=1e-6)


def test_a_schedule_of_a_history_that_is_not_there_is_refused_by_name():
  objective = objective_of(
    penalties={'kl': Weighted(2.0, penalties.k2)}, schedules={'kl': metric_history.kl_coefficient}
  )
  assert 'kl_coefficient' in objective.requires
  with pytest.raises(KeyError, match=r"schedules\.kl: kl_coefficient reads 'kl_coefficient'"):
    terms_of(objective)


def test_schedules_and_controllers_are_parts_of_a_configuration():
  spec = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.reinforce),
    aggregation=part(aggregation.token_sum, rows=2),
    penalties={
      'kl': weighted(1.0, part(penalties.k2)),
      'bonus': weighted(1.0, part(penalties.negative_entropy)),
    },
    schedules={
      'kl': part(metric_history.kl_coefficient),
      'bonus': part(metric_history.entropy_coefficient),
    },
    history={
      'kl_coefficient': part(metric_history.adaptive_kl, initial=0.5),
      'entropy_coefficient': part(metric_history.entropy_control, initial=0.1),
    },
  )
  terms, _ = terms_of(bind(spec, objectives.TABLE))
  np.testing.assert_allclose(terms['kl'].value(), 0.5 * 4 * 0.125)
  np.testing.assert_allclose(terms['bonus'].value(), -0.1 * 4 * 0.4, rtol=1e-6)


@pytest.mark.parametrize(('rejected', 'count'), [('weights', 4), ('only', 3)])
def test_a_rejected_token_counts_in_the_denominator_or_not(rejected, count):
  """The second token has a ratio of exp(3) to the sampler."""
  slot = (
    dict(weights={'keep': weights.selected}) if rejected == 'weights' else dict(only='selected')
  )
  terms, _ = terms_of(objective_of(selections={'selected': selections.token_band}, **slot))
  assert terms['policy'].count == count
  np.testing.assert_allclose(terms['policy'].total, -(1 + 1 - 2))


def test_weights_by_prompt_make_a_token_mean_a_mean_over_prompts():
  terms, _ = terms_of(
    objective_of(
      selections={'prompt_weights': selections.per_prompt}, weights={'prompt': weights.per_prompt}
    )
  )
  np.testing.assert_allclose(terms['policy'].value(), -(1 - 2) / 2)


def test_self_normalized_weights_have_the_mean_one():
  terms, _ = terms_of(
    objective_of(
      selections={'normalized_weights': selections.self_normalized},
      weights={'mismatch': weights.normalized},
    )
  )
  rho = np.array([1.0, 2.0, 1.0, 1.0])  # cut at 2
  np.testing.assert_allclose(
    terms['policy'].value(), -np.sum(rho * [1, 1, 1, -2]) / rho.sum(), rtol=1e-6
  )
