"""Every method for several turns: its gradient is minus the aggregated weight of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit, methods
from polgrad.arrays import OF_TURNS, shape_of
from polgrad.registry import bind
from tests.multi_turn.credit_test import random_batch
from tests.policy_gradient import harness
from tests.policy_gradient.harness import constant_length, ppo, sequence_sum, token_mean
from tests.policy_gradient.oracles_standard import clipped, clipped_value_error, delta, forward_kl
from tests.runs import method_of

NAMES = methods.FAMILIES['multi_turn']


def turns(mask):
  """Per row the runs of the mask, as lists of columns."""
  found = []
  for row in mask:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
    found.append([list(range(a, b)) for a, b in edges.reshape(-1, 2)])
  return found


def turn_ratio(x):
  out, d = np.ones(x['mask'].shape), x['logp'] - x['proximal_logp']
  for b, row in enumerate(turns(x['mask'])):
    for turn in row:
      out[b, turn] = np.exp(d[b, turn].mean())
  return out


def in_first_turn(x):
  out = np.zeros(x['mask'].shape)
  for b, row in enumerate(turns(x['mask'])):
    if row:
      out[b, row[0]] = 1
  return out


def with_critic(weight, eps):
  return lambda x: {
    'logp': token_mean(weight(x), x['mask']),
    'values': clipped_value_error(x, 0.5, eps),
  }


ORACLES = {
  'gigpo': lambda x: token_mean(clipped(x) + 0.01 * forward_kl(x), x['mask']),
  'empg': lambda x: token_mean(clipped(x), x['mask']),
  'turn_grpo': lambda x: token_mean(clipped(x), x['mask']),
  'turn_rloo': lambda x: sequence_sum(x['advantages'], x['mask']),
  'areal_retry': lambda x: token_mean(clipped(x), x['mask']),
  'simpletir': lambda x: token_mean(clipped(x, 0.8, 1.28), x['mask']),
  'ragen': with_critic(lambda x: clipped(x, 0.8, 1.28), 0.28),
  'turn_ppo': with_critic(lambda x: ppo(x, turn_ratio(x), 0.8, 1.2), 0.2),
  'spiral': lambda x: constant_length(clipped(x), x['mask'], 5),
  'score_stage_one': lambda x: sequence_sum(
    x['advantages'] - 0.1 * in_first_turn(x) * delta(x), x['mask']
  ),
  'score_stage_two': lambda x: sequence_sum(x['advantages'] - 0.01 * delta(x), x['mask']),
}


def test_every_method_has_an_oracle():
  assert sorted(ORACLES) == sorted(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_gradient_is_the_aggregated_weight_of_the_paper(name, x64):
  objective = harness.objective_of(name)
  x = harness.random_arrays(objective)
  assert any(len(row) > 1 for row in turns(x['mask']))
  _, got = harness.loss_and_weight(objective, x)
  expected = ORACLES[name](x)
  expected = expected if isinstance(expected, dict) else {'logp': expected}
  for leaf, weight in got.items():
    wanted = np.broadcast_to(expected.get(leaf, 0.0), weight.shape)
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, atol=1e-9, err_msg=leaf)


SAMPLED = [n for f in ('policy_gradient', 'multi_turn') for n in methods.FAMILIES[f]]
# One method of each credit: weights_test.py of policy gradients has all objectives on masks with holes.
BY_CREDIT = {method_of(name).credit.to_json(): name for name in reversed(SAMPLED)}


@pytest.mark.parametrize('name', sorted(BY_CREDIT.values()))
def test_any_method_takes_rows_of_several_turns(name):
  """Credit and loss are traced on a batch with rewards of turns; almost nothing is compiled."""
  method = method_of(name)
  batch = random_batch()
  own = {n: batch[n] for n in batch if n in (method.reads - {'mask'}) | {*OF_TURNS}}
  shape = batch.mask.shape
  wanted = (method.reads - {'mask'}) - own.keys()
  logits = dict.fromkeys(('logits', 'teacher_logits'), (*shape, 5))
  sizes = {'baseline_rewards': (len(batch.mask), 3), **logits}
  row = {n for n in wanted if shape_of(n) == 'B'}
  arrays = {n: jnp.full(sizes.get(n, shape if n not in row else shape[:1]), 0.5) for n in wanted}
  loss = lambda arrays: method.loss(mask=batch.mask, **arrays)[0]
  assert jax.eval_shape(loss, own | arrays).shape == ()


READ = {
  name
  for name in SAMPLED
  if bind(method_of(name).credit, credit.TABLE).provides & {'returns'}
  or method_of(name).credit.name
  in ('credit.reward_to_go', 'credit.token_baseline', 'credit.turn_returns', 'credit.gigpo')
}


def test_methods_that_credit_tokens_read_the_rewards_of_turns():
  assert {'ppo', 'reinforce_plus_plus', 'otb', 'impala', 'retrace', 'ragen', 'gigpo'} <= READ
  assert not {'grpo', 'rloo', 'dapo', 'areal_retry'} & READ
