"""Controlled decoding on a tree of 81 sequences, where values and distributions are exact sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import methods, objectives
from polgrad.losses import aggregation, logit_stats, prefix_values
from polgrad.registry import call, inputs
from polgrad.sampling import behavior_policies
from polgrad.tabular import enumerable
from polgrad.types import Batch, Outputs

DEPTH, VOCAB = 4, 3
TREE = enumerable.table(VOCAB, DEPTH)


def tree() -> tuple[np.ndarray, np.ndarray]:
  """Logits [P, V] of the reference, in the rows of `TREE`, and the reward of every sequence."""
  random = np.random.default_rng(0)
  drawn = {
    prefix: random.normal(size=VOCAB)
    for length in range(DEPTH)
    for prefix in itertools.product(range(VOCAB), repeat=length)
  }
  logits = np.zeros((len(drawn), VOCAB))
  for tokens, rows in zip(TREE.tokens, TREE.prefixes):
    for t in range(DEPTH):
      logits[rows[t]] = drawn[tuple(tokens[:t].tolist())]
  return logits, random.normal(size=VOCAB**DEPTH)


LOGITS, REWARDS = tree()
MASK = np.ones((VOCAB**DEPTH, DEPTH), bool)


def log_p(logits) -> np.ndarray:
  """Log-probability of every sequence."""
  return np.asarray(jnp.sum(enumerable.logp(TREE, jnp.asarray(logits)), axis=1))


def expected(of_sequence, logits) -> np.ndarray:
  """[P, V]: for each prefix and next token, the mean of a number of the sequences under a policy."""
  after = np.cumsum(enumerable.logp(TREE, jnp.asarray(logits))[:, ::-1], axis=1)[:, ::-1]
  after = np.concatenate([after[:, 1:], np.zeros((len(after), 1))], axis=1)
  total = np.zeros_like(LOGITS)
  np.add.at(total, (TREE.prefixes, TREE.tokens), np.exp(after) * of_sequence[:, None])
  return total


@pytest.fixture(scope='module', autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


@functools.cache
def exact_values() -> np.ndarray:
  return expected(REWARDS, LOGITS)


def measured(log_probs) -> tuple[float, float]:
  """Mean reward, and KL to the reference."""
  probs = np.exp(log_probs)
  return float(probs @ REWARDS), float(probs @ (log_probs - log_p(LOGITS)))


def steered(strength, values=None) -> np.ndarray:
  values = exact_values() if values is None else values
  policy = behavior_policies.controlled(jnp.asarray(LOGITS), jnp.asarray(values), strength=strength)
  return log_p(policy)


def blockwise(block: int, candidates: int) -> np.ndarray:
  """Log-probability of each sequence: each block is the best of several drawn from the reference."""
  log_probs = np.zeros(len(MASK))
  reference = np.asarray(enumerable.logp(TREE, jnp.asarray(LOGITS)))
  value = exact_values()[TREE.prefixes, TREE.tokens]  # [S, H], of the prefix with the token
  for start in range(0, DEPTH, block):
    end = start + block
    p = np.exp(reference[:, start:end].sum(axis=1))
    for prefix in itertools.product(range(VOCAB), repeat=start):
      own = np.flatnonzero((TREE.tokens[:, :start] == np.array(prefix, int)).all(axis=1))
      # One row of each block, with its probability and value.
      _, first = np.unique(TREE.tokens[own, :end], axis=0, return_index=True)
      rows = own[first]
      below = np.array([p[rows][value[rows, end - 1] < v].sum() for v in value[rows, end - 1]])
      chosen = (below + p[rows]) ** candidates - below**candidates
      for row, q in zip(rows, chosen):
        same = (TREE.tokens[:, :end] == TREE.tokens[row, :end]).all(axis=1)
        log_probs[same] += np.log(q)
  return log_probs


def test_the_tree_is_the_stated_one():
  assert np.exp(log_p(LOGITS)) @ REWARDS == pytest.approx(-0.2553, abs=1e-4)


def test_cd_q_is_exact_after_as_many_sweeps_as_there_are_tokens():
  """Each sweep regresses on the targets of all rows, whichever policy made them."""
  values, errors = np.zeros_like(LOGITS), []
  for _ in range(DEPTH + 1):
    errors.append(np.abs(values - exact_values()).max())
    before = logit_stats.expected_logit(jnp.asarray(values), jnp.asarray(LOGITS))
    target = prefix_values.bootstrapped(
      jnp.asarray(REWARDS), before[TREE.prefixes], jnp.asarray(MASK)
    )
    values = np.zeros_like(LOGITS)
    values[TREE.prefixes, TREE.tokens] = target  # all rows of a prefix have the same target
  np.testing.assert_allclose(errors[1:], [1.705, 0.668, 0.372, 0], atol=1e-3)
  assert errors[-1] < 1e-12


def test_cd_fudge_learns_the_values_of_the_policy_that_samples():
  """Its least squares are means over rows: right for rows of the reference, biased for others."""
  for behavior, root in ((LOGITS, -0.2553), (np.zeros_like(LOGITS), -0.0908)):
    weights = np.exp(log_p(behavior))
    target = prefix_values.monte_carlo(jnp.asarray(REWARDS), jnp.asarray(MASK))
    total, count = np.zeros_like(LOGITS), np.zeros_like(LOGITS)
    np.add.at(total, (TREE.prefixes, TREE.tokens), weights[:, None] * target)
    np.add.at(count, (TREE.prefixes, TREE.tokens), np.tile(weights[:, None], DEPTH))
    np.testing.assert_allclose(total / count, expected(REWARDS, behavior), atol=1e-12)
    assert weights @ REWARDS == pytest.approx(root, abs=1e-4)


def test_decoding_by_tokens():
  found = [measured(steered(s)) for s in (0.5, 1, 2, 4)]
  stated = [(0.1540, 0.1005), (0.4696, 0.3394), (0.8538, 0.9180), (1.1337, 1.7922)]
  np.testing.assert_allclose(found, stated, atol=1e-4)


def test_decoding_by_tokens_is_not_the_best_trade_for_sequences_but_with_soft_values_it_is():
  strength = 1.3
  soft = np.log(expected(np.exp(strength * REWARDS), LOGITS)) / strength
  tilt = log_p(LOGITS) + strength * REWARDS
  tilt -= np.log(np.exp(tilt).sum())
  np.testing.assert_allclose(steered(strength, soft), tilt, atol=1e-10)
  # At an equal KL the exact values win less reward than the tilt.
  reward, kl = measured(steered(1.0))
  tilts = [log_p(LOGITS) + s * REWARDS for s in np.linspace(0.1, 2, 200)]
  tilts = [measured(t - np.log(np.exp(t).sum())) for t in tilts]
  best = np.interp(kl, [k for _, k in tilts], [r for r, _ in tilts])
  assert reward < best - 1e-3


@pytest.mark.parametrize(
  'block, reward, kl, bound',
  ((1, 0.8941, 1.9858, 2.5452), (2, 0.8452, 1.2182, 1.2726), (4, 0.6896, 0.6354, 0.6363)),
)
def test_decoding_by_blocks(block, reward, kl, bound):
  found = measured(blockwise(block, 4))
  np.testing.assert_allclose(found, (reward, kl), atol=1e-4)
  limit = DEPTH / block * (np.log(4) - 3 / 4)
  assert limit == pytest.approx(bound, abs=1e-4) and found[1] <= limit


def test_one_block_of_full_length_is_best_of_n():
  order = np.argsort(REWARDS)
  below = np.cumsum(np.exp(log_p(LOGITS))[order])
  best = np.zeros(len(order))
  best[order] = np.diff(below**4, prepend=0)
  np.testing.assert_allclose(np.exp(blockwise(DEPTH, 4)), best, atol=1e-12)


def win_rate(first, second) -> float:
  p, q = np.exp(first), np.exp(second)
  wins = (REWARDS[:, None] > REWARDS) + 0.5 * (REWARDS[:, None] == REWARDS)
  return float(p @ wins @ q)


def test_blocks_win_against_best_of_n_with_as_many_candidates():
  best = blockwise(DEPTH, 4)
  assert win_rate(blockwise(2, 4), best) == pytest.approx(0.5986, abs=1e-3)
  assert win_rate(best, log_p(LOGITS)) == pytest.approx(4 / 5, abs=0.02)  # n / (n + 1)
  # Tokens steered to the KL of best-of-n win as much against the reference.
  reference = log_p(LOGITS)
  equal = min(
    (steered(s) for s in np.linspace(1, 2, 41)), key=lambda p: abs(measured(p)[1] - 0.6354)
  )
  assert win_rate(equal, reference) == pytest.approx(win_rate(best, reference), abs=0.02)


def test_several_scorers_add_up():
  random = np.random.default_rng(0)
  arrays = {n: jnp.asarray(random.normal(size=(2, 5))) for n in ('base', 'kind', 'short')}
  policy = behavior_policies.controlled_by({'kind': 2.0, 'short': -0.5}, base='base')
  assert inputs(policy) == ('base', 'kind', 'short')
  one = arrays['kind'] - 0.25 * arrays['short']
  expected = behavior_policies.controlled(arrays['base'], one, strength=2.0)
  np.testing.assert_allclose(call(policy, arrays), expected, atol=1e-6)
  np.testing.assert_allclose(
    behavior_policies.controlled(arrays['base'], one, strength=0.0),
    jax.nn.log_softmax(arrays['base']),
    atol=1e-6,
  )


def test_targets_skip_what_the_mask_leaves_out():
  mask = jnp.array([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
  state_value = jnp.arange(18.0).reshape(3, 6)
  found = jax.jit(prefix_values.bootstrapped)(jnp.array([100.0, 200, 300]), state_value, mask)
  np.testing.assert_array_equal(found[0][mask[0]], [3, 4, 100])
  np.testing.assert_array_equal(found[1][mask[1]], [7, 200])


def test_the_loss_is_half_the_squared_error_of_the_tokens_logit():
  random = np.random.default_rng(0)
  logits = jnp.asarray(random.normal(size=(4, 3, 7)), jnp.float32)
  tokens = jnp.asarray(random.integers(0, 7, (4, 3)))
  mask, rewards = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool), jnp.arange(4.0)
  method = methods.cd_fudge()
  loss = lambda logits: method.loss(
    mask=mask, tokens=tokens, logits=logits, logp=jnp.zeros((4, 3)), rewards=rewards
  )[0]
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  error = np.take_along_axis(np.asarray(logits), np.asarray(tokens)[..., None], axis=-1)[..., 0]
  error = (error - np.asarray(rewards)[:, None]) * np.asarray(mask)
  assert value == pytest.approx(0.5 * np.sum(error**2) / 6, rel=1e-5)
  wanted = np.zeros_like(logits)
  np.put_along_axis(wanted, np.asarray(tokens)[..., None], error[..., None] / 6, axis=-1)
  np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_targets_have_no_gradient():
  objective = objectives.PrefixValues(
    target=prefix_values.bootstrapped, aggregation=aggregation.token_mean
  )
  mask = jnp.ones((1, 3), bool)

  def loss(state_value):
    batch = Batch(tokens=jnp.zeros((1, 3), int), segment_ids=mask.astype(int), mask=mask)
    batch = batch.with_arrays(rewards=jnp.ones(1), state_value=state_value)
    outputs = Outputs(logp=jnp.zeros((1, 3)), stats={'token_value': jnp.ones((1, 3))})
    return objective.apply(outputs, batch, (), step=0)[0]['prefix_values'].value()

  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.zeros((1, 3))), 0)
