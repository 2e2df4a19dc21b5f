"""Weighted likelihoods and what they reduce to: gradients and stationary points in closed form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import methods, optim
from polgrad.losses import (
  listwise,
  logit_stats,
  penalties,
  ratios,
  selections,
  surrogates,
  weights,
)
from tests.runs import method_of

RNG = np.random.default_rng(11)
B, T = 4, 5
LOGP = -RNG.uniform(0.1, 3.0, size=(B, T))
OLD = LOGP + RNG.normal(size=(B, T)) / 2
A = RNG.normal(size=(B, T))
MASK = np.ones((B, T), bool)


def test_probability_weighting_descends_the_negative_probability(x64):
  logits = jnp.array([0.3, -1.0, 0.8])

  def weighted(x):
    logp = jax.nn.log_softmax(x)[1]
    return -weights.probability(logp) * logp

  expected = jax.grad(lambda x: -jax.nn.softmax(x)[1])(logits)
  np.testing.assert_allclose(jax.grad(weighted)(logits), expected, atol=1e-15)


def kept(ratio, a, eps=0.2):
  """Where the clip of PPO keeps the gradient."""
  return ~((a > 0) & (ratio > 1 + eps) | (a < 0) & (ratio < 1 - eps))


P, RHO = np.exp(LOGP), np.exp(LOGP - OLD)
ROW_RHO = np.exp((LOGP - OLD).mean(1, keepdims=True))
# Of each method: the loss of a token; the policy pi_den, the advantage and the mask of the gradient
# mask * (1 / pi_den) * advantage * grad pi(token).
UNIFIED = {
  'supervised': (lambda lp: -lp, (P, 1.0, 1.0)),
  'dft': (lambda lp: -weights.probability(lp) * lp, (1.0, 1.0, 1.0)),
  'reinforce': (lambda lp: surrogates.reinforce(lp, A), (P, A, 1.0)),
  'ppo': (lambda lp: surrogates.clipped(lp - OLD, A), (np.exp(OLD), A, kept(RHO, A))),
  'cispo': (
    lambda lp: surrogates.truncated(lp, lp - OLD, A, cap=1.2),
    (np.exp(OLD), A, np.minimum(1.2 / RHO, 1)),
  ),
  'gspo': (
    lambda lp: surrogates.clipped(ratios.sequence_geometric(lp - OLD, MASK), A),
    (P / ROW_RHO, A, kept(ROW_RHO, A)),
  ),
  'luffy': (lambda lp: surrogates.probability_shaped(lp, A), (1.0, A, 0.1 / (P + 0.1) ** 2)),
}


@pytest.mark.parametrize('name', UNIFIED)
def test_every_loss_is_an_instance_of_the_unified_gradient(name, x64):
  """HPT (arXiv:2509.04419), its table: one gradient with a denominator, an advantage and a mask."""
  loss, (denominator, advantage, mask) = UNIFIED[name]
  found = -jax.grad(lambda lp: jnp.sum(loss(lp)))(jnp.asarray(LOGP))
  np.testing.assert_allclose(found, mask * advantage * P / denominator, atol=1e-12)
  assert name != 'ppo' or 0 < np.sum(mask) < B * T


@pytest.mark.parametrize('gamma', [0.1, 1e9])
def test_the_demonstration_of_srft_is_an_instance_too(gamma, x64):
  """Its denominator is 1, and its advantage that of samples and demonstration together.

  The mask is that of the shaped probability, which tends to 1 / gamma where nothing is shaped.
  """
  method = methods.srft(max_new_tokens=T, gamma=gamma, imitation=0.0, reinforcement=1.0)
  rewards, group = np.array([0.0, 1.0, 0.0, 1.0]), np.zeros(B, int)
  x = dict(
    rewards=rewards, group_ids=group, stream=np.array([1, 1, 1, 0]), entropy=np.zeros((B, T))
  )
  found = jax.grad(lambda lp: method.loss(mask=MASK, logp=lp, **x)[0])(jnp.asarray(LOGP))
  mask = {0.1: 0.1 / (P + 0.1) ** 2, 1e9: 1e-9}[gamma]
  expected = mask * (rewards - rewards.mean())[:, None] * P
  np.testing.assert_allclose(-found[3], (expected / (B * T))[3], rtol=1e-6)


def test_the_shaped_probability_of_luffy_has_three_limits(x64):
  grad = lambda fn: jax.grad(lambda lp: jnp.sum(fn(lp)))(jnp.asarray(LOGP))
  shaped = lambda gamma: grad(lambda lp: surrogates.probability_shaped(lp, A, gamma=gamma))
  # gamma f -> p: the unshaped term, DFT with an advantage.
  np.testing.assert_allclose(1e9 * shaped(1e9), grad(lambda lp: -A * jnp.exp(lp)), rtol=1e-6)
  dft = grad(lambda lp: -A * weights.probability(lp) * lp)
  np.testing.assert_allclose(1e9 * shaped(1e9), dft, rtol=1e-6)
  at = lambda p: (
    -float(
      jax.grad(lambda x: surrogates.probability_shaped(x, jnp.ones(()), gamma=0.1))(jnp.log(p))
    )
  )
  np.testing.assert_allclose(at(0.1), 0.25, rtol=1e-12)
  np.testing.assert_allclose(at(1e-7), 1e-6, rtol=1e-4)  # A p / gamma


def test_luffy_without_demonstrations_is_reinforcement_without_clipping(x64):
  method = method_of('luffy')
  x = dict(advantages=A, proximal_logp=OLD, stream=np.ones(B, int), entropy=np.zeros((B, T)))
  loss = lambda lp: method.loss(mask=MASK, logp=lp, **x)[0]
  found = jax.grad(loss)(jnp.asarray(LOGP))
  np.testing.assert_allclose(found, -A * RHO / (B * T), rtol=1e-6)


@pytest.mark.parametrize(
  ('mu', 'phi'),
  [
    (0.0, 'undecided'),
    (0.3, 'undecided'),
    (1.0, 'undecided'),
    (1.0, 'probability'),
    (1.0, 'alike'),
  ],
)
def test_chord_is_between_grpo_and_a_weighted_likelihood(mu, phi, x64):
  stream = np.array([0, 1, 0, 1])
  method = methods.chord(warmup=0, decay=1, peak=mu, valley=mu, weigh=phi)
  x = dict(advantages=A, behavior_logp=OLD, stream=stream)
  loss = lambda lp: method.loss(mask=MASK, logp=lp, step=7, **x)[0]
  found = np.asarray(jax.grad(loss)(jnp.asarray(LOGP)))
  weight = {'undecided': P * (1 - P), 'probability': P, 'alike': np.ones((B, T))}[phi]
  expected = np.where(
    stream[:, None] == 0, -mu * weight / (2 * T), -(1 - mu) * kept(RHO, A) * A * RHO / (2 * T)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_known_tokens_have_no_gradient_beyond_the_cutoff_of_chord(x64):
  """min(log pi, log c), while the weight is that of the whole probability."""
  method = methods.chord(warmup=0, decay=1, peak=1.0, valley=1.0, cutoff=0.3)
  x = dict(advantages=A, behavior_logp=OLD, stream=np.zeros(B, int))
  loss = lambda lp: method.loss(mask=MASK, logp=lp, step=7, **x)[0]
  value, found = jax.value_and_grad(loss)(jnp.asarray(LOGP))
  phi = P * (1 - P)
  np.testing.assert_allclose(value, -(phi * np.minimum(LOGP, np.log(0.3))).mean(), rtol=1e-6)
  np.testing.assert_allclose(found, np.where(P > 0.3, 0, -phi / (B * T)), rtol=1e-6)
  assert 0 < (P > 0.3).sum() < B * T
  certain = jax.grad(lambda lp: penalties.nll(lp))(0.0)
  assert certain == -1  # without a cutoff also a certain token has the whole gradient


@pytest.mark.parametrize(
  ('knobs', 'weight'),
  [
    (dict(shape='power'), 0.5 * np.sqrt(P)),
    (dict(shape='power', exponent=1.0), P),
    (dict(shape='likelihood'), 1.0),
    (dict(gamma=0.3), 0.3 * P / (P + 0.3) ** 2),
  ],
)
def test_the_shapes_of_luffy(knobs, weight, x64):
  method = methods.luffy(max_new_tokens=T, entropy_coefficient=0.0, **knobs)
  x = dict(advantages=A, proximal_logp=OLD, stream=np.zeros(B, int), entropy=np.zeros((B, T)))
  loss = lambda lp: method.loss(mask=MASK, logp=lp, **x)[0]
  found = jax.grad(loss)(jnp.asarray(LOGP))
  np.testing.assert_allclose(found, -A * weight / (B * T), rtol=1e-6)


def test_the_probability_that_weighs_rewards_has_a_floor(x64):
  """DFT's variant for rewards: -A sg(max(p, 0.1)) log p."""
  loss = lambda lp: jnp.sum(weights.probability(lp, floor=0.1) * surrogates.reinforce(lp, A))
  found = jax.grad(loss)(jnp.asarray(LOGP))
  np.testing.assert_allclose(found, -A * np.maximum(P, 0.1), rtol=1e-12)
  assert P.min() < 0.1 < P.max()


def test_the_best_discriminator_is_the_log_ratio_to_the_teacher(x64):
  """GAD on a vocabulary: at D = log T / S + c its loss is at rest, and D is the reward of the KL."""
  t, s = jax.nn.softmax(jnp.asarray(RNG.normal(size=(2, 4))))
  a, b = np.divmod(np.arange(16), 4)  # all pairs of a teacher's and a student's token

  def loss(d):
    score = jnp.stack([d[a], d[b]], axis=1).ravel()
    rows = listwise.given_above(
      score, jnp.tile(jnp.array([0, 1]), 16), jnp.repeat(jnp.arange(16), 2)
    )
    return jnp.sum(rows.reshape(16, 2) * (t[a] * s[b])[:, None])

  best = jnp.log(t / s) + 0.7
  np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-15)
  assert jnp.abs(jax.grad(loss)(2 * best)).max() > 1e-3
  z = jnp.log(s)
  gain = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * best))(z)
  kl = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - jnp.log(t))))(z)
  np.testing.assert_allclose(gain, -kl, atol=1e-15)


def test_the_weight_of_chord_is_largest_where_the_policy_is_undecided():
  p = np.linspace(0.001, 0.999, 999)
  found = np.asarray(weights.undecided(jnp.log(p)))
  assert p[found.argmax()] == 0.5 and found.max() <= 0.25
  np.testing.assert_allclose(weights.undecided(jnp.array([0.0, -99.0])), 0, atol=1e-12)


def test_smoothing_is_a_divergence_from_the_uniform_policy_and_bounds_the_margin(x64):
  z, v, e = jnp.asarray(RNG.normal(size=6)), 6, 0.1
  logp = np.asarray(jax.nn.log_softmax(z))
  found = logit_stats.smoothed_nll(z, jnp.array(2), smoothing=e)
  uniform = -np.log(v) - logp.mean()  # KL(uniform, pi)
  np.testing.assert_allclose(found, -(1 - e) * logp[2] + e * (np.log(v) + uniform), rtol=1e-12)
  margin = np.log((1 - e + e / v) / (e / v))
  best = jnp.where(jnp.arange(v) == 2, margin, 0.0)
  gradient = jax.grad(lambda z: logit_stats.smoothed_nll(z, jnp.array(2), smoothing=e))(best)
  np.testing.assert_allclose(gradient, 0, atol=1e-15)


@pytest.mark.parametrize('coefficient', [1e-2, 1.0])
def test_the_penalty_of_the_normalizer_fixes_what_the_likelihood_leaves_open(coefficient, x64):
  """The optimum of both has logsumexp 0 and the frequencies of the data, for any coefficient."""
  q = jnp.array([0.6, 0.3, 0.1])
  nll = lambda z, y: -jax.nn.log_softmax(z)[y]
  loss = lambda z: (
    sum(q[y] * nll(z, y) for y in range(3)) + (coefficient * logit_stats.squared_log_normalizer(z))
  )
  np.testing.assert_allclose(jax.grad(loss)(jnp.log(q)), 0, atol=1e-15)
  shifted = jax.grad(loss)(jnp.log(q) + 0.5)
  np.testing.assert_allclose(shifted, coefficient * q, rtol=1e-12)  # 2 c Z p, with Z = 1 / 2
  assert np.linalg.eigvalsh(jax.hessian(loss)(jnp.log(q))).min() > 0


FREE = dict(shift_low=-99, shift_high=99, low=0.0, high=np.inf)


def test_suffix_weights_reduce_to_one_and_have_the_mean_one(x64):
  """On answers that no outcome filters, the expected gradient is that of supervised learning."""
  for block in (1, 2, 9):
    one = weights.suffix_importance(LOGP, LOGP, MASK, block=block, decay=1.0)
    np.testing.assert_array_equal(one, 1)
  np.testing.assert_array_equal(weights.row_importance(LOGP, LOGP, MASK), 1)
  first, second, third = (
    np.asarray(jax.nn.log_softmax(RNG.normal(size=shape)))
    for shape in ((2, 3), (2, 3, 3), (2, 3, 3, 3))
  )
  rows = np.array(list(itertools.product(range(3), repeat=3)))
  a, b, c = rows.T
  own, behavior = (
    np.stack([first[k][a], second[k][a, b], third[k][a, b, c]], axis=1) for k in (0, 1)
  )
  found = weights.suffix_importance(own, behavior, np.ones((27, 3), bool), decay=1.0, **FREE)
  drawn = np.exp(behavior)
  for x in range(3):  # E[w_1 | first token]
    mean = (drawn[:, 1] * drawn[:, 2] * found[:, 0])[a == x].sum()
    np.testing.assert_allclose(mean, 1, rtol=1e-12)
  np.testing.assert_array_equal(found[:, 2], 1)


def test_implied_rewards_change_with_a_constant_at_the_last_token_alone(x64):
  """Adding c to all logits leaves the likelihood and all rewards but the last one."""
  method = method_of('iq_learn')
  logits, tokens = RNG.normal(size=(1, 4, 3)), RNG.integers(3, size=(1, 4))
  mask = np.ones((1, 4), bool)

  def loss(z):
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(z)), tokens[..., None], -1)[..., 0]
    return float(method.loss(mask=mask, logits=z, logp=logp, tokens=tokens)[0])

  last = logits[0, 3, tokens[0, 3]]
  for c in (0.7, -2.0):
    moved = 0.1 * ((last + c) ** 2 - last**2) / 4
    np.testing.assert_allclose(loss(logits + c) - loss(logits), moved, rtol=1e-6)


def test_averages_of_the_policy_have_their_two_ends_and_rise():
  old, new = {'w': jnp.ones(2), 'n': jnp.array(1)}, {'w': 3 * jnp.ones(2), 'n': jnp.array(5)}
  at = lambda decay: optim.ema(old, new, 1, decay=decay)
  np.testing.assert_array_equal(at(0.0)['w'], 3)
  np.testing.assert_array_equal(at(1.0)['w'], 1)
  assert at(0.5)['n'].dtype == old['n'].dtype
  rising = lambda step: float(
    optim.rising_ema({'w': jnp.zeros(())}, {'w': jnp.ones(())}, step, start=0.996, steps=100)[
      'w'
    ].item()
  )
  expected = [0.004 * x for x in (1.0, 0.5 + np.sqrt(0.125), 0.5, 0.0, 0.0)]
  np.testing.assert_allclose([rising(n) for n in (0, 25, 50, 100, 300)], expected, atol=1e-8)


def test_a_corrected_average_has_forgotten_its_start(x64):
  """It is a mean from 0, divided by the sum of its weights."""
  points, decay = RNG.normal(size=(5, 3)), 0.8
  anchor, zero = {'w': jnp.full(3, 9.0)}, np.zeros(3)
  for k, point in enumerate(points, start=1):
    anchor = optim.ema(anchor, {'w': jnp.asarray(point)}, k, decay=decay, corrected=True)
    zero = decay * zero + (1 - decay) * point
    np.testing.assert_allclose(anchor['w'], zero / (1 - decay**k), rtol=1e-12)
  for k, point in enumerate(points, start=1):
    anchor = optim.ema(anchor, {'w': jnp.asarray(point)}, k, decay=1.0, corrected=True)
  np.testing.assert_allclose(anchor['w'], points.mean(0), rtol=1e-12)


def chain(high, rounds=6, episodes=3000, seed=0):
  """Mean lengths of successes: five states to pass within ten actions, of which one advances, one
  loops and two fail; the policy counts the actions of successes, those that `central_turns` keeps."""
  central = jax.jit(functools.partial(selections.central_turns, low=0.0, high=high))
  random = np.random.default_rng(seed)
  policy, lengths = np.full((5, 4), 0.25), []
  for _ in range(rounds):
    states, taken = np.zeros((2, episodes, 10), int)
    place, alive, mask = np.zeros(episodes, int), np.ones(episodes, bool), []
    for t in range(10):
      active = alive & (place < 5)
      now = np.minimum(place, 4)
      a = (random.random(episodes)[:, None] > policy[now].cumsum(1)).sum(1).clip(max=3)
      states[:, t], taken[:, t] = now, a
      mask.append(active)
      alive &= ~(active & (a >= 2))
      place = place + (active & (a == 0))
    mask, won = np.array(mask).T, place == 5
    lengths.append(mask[won].sum(1).mean())
    steps = np.broadcast_to(np.arange(10), mask.shape)
    keep = np.asarray(central(np.log(policy[states, taken]), won.astype(float), steps, mask))
    counts = np.full((5, 4), 0.5)
    np.add.at(counts, (states[keep], taken[keep]), 1)
    policy = counts / counts.sum(1, keepdims=True)
  return np.array(lengths), won.mean()


def test_a_filter_of_the_least_likely_steps_unlearns_loops(x64):
  """BFS-Prover-V2 on a chain: without it, proofs stay as long as the first ones."""
  plain, solved = chain(high=1.0)
  assert solved > 0.98 and plain[-1] > 5.8
  filtered, solved = chain(high=0.9)
  assert solved > 0.98 and filtered[-1] < 5.05


def test_the_middle_eight_tenths_are_kept(x64):
  surprise = 2 + np.random.default_rng(0).normal(size=(4000, 1))
  ones, ids = np.ones((4000, 1), bool), np.zeros((4000, 1), int)
  keep = lambda shift: np.asarray(
    selections.central_turns(shift - surprise, np.ones(4000), ids, ones, low=0.1, high=0.9)
  )
  np.testing.assert_allclose(keep(0.0).mean(), 0.8, atol=1e-3)
  np.testing.assert_array_equal(keep(0.0), keep(-3.0))  # a constant changes nothing


def test_one_token_rollouts_are_dft_with_a_factor(x64):
  """At temperature 1 the gradient is (1 - beta) times that of DFT; beta = 1 teaches nothing."""
  z, token = jnp.asarray(np.random.default_rng(3).normal(size=5)), jnp.array(1)
  fn = functools.partial(logit_stats.one_token_rollout, tokens=token, temperature=1.0)
  grad = lambda beta: np.asarray(jax.grad(lambda z: fn(z, beta=beta))(z))
  dft = np.asarray(jax.grad(lambda z: -jax.nn.softmax(z)[1])(z))
  for beta in (-0.1, 0.0, 0.5, 1.0):
    np.testing.assert_allclose(grad(beta), (1 - beta) * dft, atol=1e-15)
  p = np.asarray(jax.nn.softmax(z))
  reward = np.where(np.arange(5) == 1, 1.0, -0.1)
  each = reward[:, None] * (p - np.eye(5))  # gradient of one draw
  np.testing.assert_allclose(p @ each, grad(-0.1), atol=1e-15)
