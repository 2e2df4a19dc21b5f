"""Every policy-gradient method: its gradient is minus the aggregated weight of its paper.

The oracles are written in NumPy from the equations, without polgrad; they see what a loss sees and
return -dloss/dlogp (or a dict, if the loss also moves values, entropy or statistics).
"""

import numpy as np
import pytest

from tests.policy_gradient import harness, oracles

ORACLES = oracles.entries('ORACLES')
FIX_A = [(k, *row) for k, rows in oracles.entries('FIX_A').items() for row in rows]


def test_every_method_has_an_oracle():
  assert sorted(ORACLES) == harness.NAMES, 'ORACLES of tests/policy_gradient/oracles_*.py differ'


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', harness.NAMES)
def test_gradient_is_the_aggregated_weight_of_the_paper(name, seed, x64):
  objective = harness.objective_of(name)
  x = harness.random_arrays(objective, group=2 if objective.rows_per_prompt == 2 else 4, seed=seed)
  _, got = harness.loss_and_weight(objective, x)
  assert name in ORACLES, f'{name}: write the weight of the paper into ORACLES of an oracles_*.py'
  expected = ORACLES[name](x)
  expected = expected if isinstance(expected, dict) else {'logp': expected}
  assert any(np.abs(w).max() > 1e-6 for w in expected.values())
  for leaf, weight in got.items():
    wanted = np.broadcast_to(expected.get(leaf, 0.0), weight.shape)
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, atol=1e-9, err_msg=leaf)


@pytest.mark.parametrize(('name', 'overrides', 'loss', 'first', 'second'), FIX_A)
def test_value_and_gradient_on_the_fixture(name, overrides, loss, first, second, x64):
  objective = harness.objective_of(name, **overrides)
  value, weight = harness.loss_and_weight(objective, harness.fix_a(objective), step=0)
  if loss is not None:
    np.testing.assert_allclose(value, loss, atol=2e-6)
  np.testing.assert_allclose(weight['logp'], [first, second], atol=2e-6)
