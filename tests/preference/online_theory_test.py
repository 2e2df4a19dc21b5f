"""What methods that sample promise, on policies so small that every expectation is a sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import credit as credits
from polgrad import methods
from polgrad.collect import beginnings, picks, scored
from polgrad.data import tokenizers
from polgrad.losses import advantages, penalties
from polgrad.registry import part, weighted
from polgrad.tabular import enumerable

ARMS = enumerable.table(6, 1)
STRINGS = enumerable.table(3, 3)
TAU = 0.3


def random_game(size, seed=0):
  """Probabilities to win that no ranking explains: P + P^T = 1."""
  skew = np.random.default_rng(seed).normal(size=(size, size))
  return 1 / (1 + np.exp(-(skew - skew.T)))


def random_policy(policy, seed):
  shape = jax.eval_shape(policy.init, jax.random.key(0)).shape
  return 0.7 * np.random.default_rng(seed).normal(size=shape)


GAME = random_game(6)
THETA, REFERENCE = random_policy(ARMS, 1), random_policy(ARMS, 2)


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


PI, MU = softmax(THETA[0]), softmax(REFERENCE[0])


def score_gradient(pi):
  """Row y is the gradient of log pi(y) by the logits of a bandit."""
  return np.eye(len(pi)) - pi[None]


def pair_gradient(method, sampler, wins=GAME, **anchors):
  """The expected gradient of a method on pairs of independent samples."""
  anchors = {'reference': REFERENCE} | anchors

  def estimate(logp, group):
    old = {f'{k}_logp': enumerable.logp(ARMS, v)[group] for k, v in anchors.items()}
    mask = jnp.ones(logp.shape, bool)
    p = jnp.asarray(wins)[group][:, group]
    return method.loss(mask=mask, logp=logp, wins=p, **old)[0]

  return np.asarray(
    enumerable.expected_gradient(
      ARMS, THETA, estimate, samples_per_prompt=2, behavior_params=sampler
    )
  ).ravel()


def self_play_gradient(sampler=PI):
  """sum_y s(y) (g(y) - mean g) grad log pi(y), g(y) = P(y beats s) - tau log(pi / mu)(y)."""
  g = GAME @ sampler - TAU * np.log(PI / MU)
  return (sampler * (g - sampler @ g)) @ score_gradient(PI)


def test_online_ipo_descends_the_self_play_objective(x64):
  """The gradient is -4 / tau times that of E[P(y beats sg y')] - tau KL(pi, mu)."""
  got = pair_gradient(methods.online_ipo(tau=TAU), THETA)
  np.testing.assert_allclose(got, -4 / TAU * self_play_gradient(), atol=1e-12)


def test_ipo_md_weighs_answers_by_the_mixture_and_needs_its_baseline(x64):
  b = 0.4
  mixture = PI ** (1 - b) * MU**b
  mixture /= mixture.sum()
  method = methods.ipo_md(tau=TAU, reference_weight=b)
  got = pair_gradient(method, np.log(mixture)[None])
  np.testing.assert_allclose(got, -4 / TAU * self_play_gradient(mixture), atol=1e-12)


def test_inpo_stops_at_one_step_of_mirror_descent(x64):
  """The gradient on pairs of pi_k is 0 at pi_k^(1 - w) mu^w exp(P(y beats pi_k) / eta)."""
  eta, tau = 0.9, 0.3
  previous = random_policy(ARMS, 3)
  w, before = tau / eta, softmax(previous[0])
  step = ((1 - w) * np.log(before) + w * np.log(MU) + GAME @ before / eta)[None]
  method = methods.inpo(steps=1, eta=eta, tau=tau)
  method.credit.label = 'soft'  # the expectation over the winners

  def at(theta):
    def estimate(logp, group):
      old = {'reference': REFERENCE, 'previous': previous}
      old = {f'{k}_logp': enumerable.logp(ARMS, v)[group] for k, v in old.items()}
      p = jnp.asarray(GAME)[group][:, group]
      return method.loss(mask=jnp.ones(logp.shape, bool), logp=logp, wins=p, **old)[0]

    sizes = dict(samples_per_prompt=2, behavior_params=previous)
    return np.abs(enumerable.expected_gradient(ARMS, theta, estimate, **sizes)).max()

  assert at(step) < 1e-12 < 1e-2 < at(previous)


STRING_GAME = random_game(27, 4)
MIXED = np.random.default_rng(5).dirichlet(np.ones(27))  # who the opponent's answers are


def nash_gradient(method, theta, reference):
  """The expected gradient of Nash-MD-PG on strings of three tokens."""
  win = jnp.asarray(STRING_GAME @ MIXED)

  def estimate(logp, group):
    old = enumerable.logp(STRINGS, theta)[group]
    return method.loss(
      mask=jnp.ones(logp.shape, bool),
      logp=logp,
      proximal_logp=old,
      reference_logp=enumerable.logp(STRINGS, reference)[group],
      baseline_wins=win[group][:, None],
      group_ids=jnp.zeros(1, jnp.int32),
    )[0]

  return enumerable.expected_gradient(
    STRINGS, theta, estimate, samples_per_prompt=1, behavior_params=theta
  )


def test_the_kl_of_nash_md_pg_is_exact_to_go_and_in_sum_and_biased_token_by_token(x64):
  theta, reference = random_policy(STRINGS, 6), random_policy(STRINGS, 7)
  tau = 0.5

  def objective(p):
    gap = enumerable.logp(STRINGS, p) - enumerable.logp(STRINGS, reference)
    win = jnp.asarray(STRING_GAME @ MIXED)
    return enumerable.objective(STRINGS, p, win - tau * jnp.sum(gap, axis=1))

  true = -jax.grad(objective)(theta)
  to_go, whole, token = methods.nash_md_pg(tau=tau), *(methods.nash_md_pg(tau=0.0) for _ in 'ab')
  whole.credit.credit = part(credits.outcome, advantage=part(advantages.raw), kl_coefficient=tau)
  token.objective.penalties = {'kl': weighted(tau, part(penalties.k2))}
  np.testing.assert_allclose(nash_gradient(to_go, theta, reference), true, atol=1e-12)
  np.testing.assert_allclose(nash_gradient(whole, theta, reference), true, atol=1e-12)
  bias = np.linalg.norm(nash_gradient(token, theta, reference) - true)
  assert bias > 0.05 * np.linalg.norm(true)


def test_the_second_term_of_hypo_is_the_gradient_of_the_kl(x64):
  theta, reference = random_policy(STRINGS, 6), random_policy(STRINGS, 7)
  given = jnp.asarray([3, 20])  # the pair of the data

  def estimate(logp, group, method):
    rows = jnp.concatenate([group, given])
    logp = jnp.concatenate([logp, jax.lax.stop_gradient(enumerable.logp(STRINGS, theta)[given])])
    return method.loss(
      mask=jnp.ones(logp.shape, bool),
      logp=logp,
      proximal_logp=enumerable.logp(STRINGS, theta)[rows],
      reference_logp=enumerable.logp(STRINGS, reference)[rows],
      label=jnp.array([0.0, 0, 1, 0]),
      stream=jnp.array([1, 1, 0, 0]),
    )[0]

  got = enumerable.expected_gradient(
    STRINGS,
    theta,
    functools.partial(estimate, method=methods.hypo(kl_coefficient=1.0)),
    samples_per_prompt=2,
    behavior_params=theta,
  )
  gap = lambda p: jnp.sum(enumerable.logp(STRINGS, p) - enumerable.logp(STRINGS, reference), axis=1)
  kl = jax.grad(lambda p: enumerable.objective(STRINGS, p, gap(p)))(theta)
  np.testing.assert_allclose(got, kl, atol=1e-12)


def xpo_losses(alpha, thetas):
  """The loss of XPO for every event (y, y', label) at policies ref_a exp(theta) : ref_b."""
  reference = np.log([1e-4, 1 - 1e-4])
  method = methods.xpo(beta=0.05, alpha=alpha)

  @jax.jit
  @jax.vmap
  def at(theta):
    policy = jax.nn.log_softmax(jnp.asarray(reference) + jnp.array([theta, 0.0]))
    return jnp.array(
      [
        [
          [
            method.loss(
              mask=jnp.ones((2, 1), bool),
              logp=policy[jnp.array([y, other])][:, None],
              reference_logp=jnp.asarray(reference)[jnp.array([y, other])][:, None],
              label=jnp.array([wins, 1.0 - wins]),
              opponent=jnp.array([0.0, 1.0]),
            )[0]
            for wins in (0.0, 1.0)
          ]
          for other in (0, 1)
        ]
        for y in (0, 1)
      ]
    )

  return np.asarray(at(jnp.asarray(thetas)))


def explored(alpha, rounds=1000, seeds=3):
  """How often arm a, which is better and nearly never sampled, was drawn; mean over seeds."""
  thetas = np.linspace(-20, 20, 401)
  thetas = thetas[np.argsort(np.abs(thetas), kind='stable')]  # of equal losses the nearest to 0
  losses = xpo_losses(alpha, thetas)
  better = 1 / (1 + np.exp(-0.5))
  drawn = []
  for seed in range(seeds):
    rng, seen, theta, count = np.random.default_rng(seed), np.zeros(len(thetas)), 0.0, 0
    for _ in range(rounds):
      pi = 1 / (1 + (1 - 1e-4) / (1e-4 * np.exp(theta)))
      y, other = int(rng.random() >= pi), int(rng.random() >= 1e-4)
      chance = [0.5, better, 1 - better][(other - y)]  # 0: equal, 1: a against b, -1: b against a
      seen += losses[:, y, other, int(rng.random() < chance)]
      theta, count = thetas[np.argmin(seen)], count + (y == 0)
    drawn.append(count)
  return np.mean(drawn)


def test_xpo_finds_an_arm_that_online_dpo_never_tries(x64):
  assert explored(0.0) < 2
  assert explored(1e-3) > 400


def test_accepted_samples_have_the_law_of_the_optimal_policy():
  """RSO: ref = (.5, .3, .2), r = (0, .5, 1), beta = .5: the first accepted has ref exp(r / beta) / Z."""
  rng = np.random.default_rng(0)
  arms = rng.choice(3, size=(4000, 64), p=[0.5, 0.3, 0.2])
  got = picks.rejection(arms / 2, np.ones(arms.shape, bool), rng, beta=0.5, rows=1)
  first = arms[np.arange(len(arms)), got.rows[:, 0]]
  np.testing.assert_allclose(np.bincount(first) / len(first), [0.1790, 0.2919, 0.5291], atol=0.025)
  assert got.usable.all()


def test_resets_solve_a_lock_in_polynomially_many_updates():
  """A lock of H binary steps: exact gradients from the start, and from uniform prefixes."""
  tokenizer = tokenizers.characters(alphabet='01')
  random = np.random.default_rng(0)
  record = {'id': 0, 'prompt': '0', 'answer': '111'}
  given = lambda length: beginnings.uniform(length, random, 0, probability=0.75)
  lengths = [len(scored.begun(record, tokenizer, given, 99).get('begun', ())) for _ in range(4000)]
  # With the stop token an answer of H tokens: with probability (H - 1) / H one of the prefixes 1..H - 1.
  np.testing.assert_allclose(np.bincount(lengths) / 4000, 0.25, atol=0.03)

  def updates(steps, starts):
    theta = np.zeros(steps)
    for number in range(10_000):
      p = 1 / (1 + np.exp(-theta))
      if p.prod() >= 0.5:
        return number
      success = np.array([p[start:].prod() for start in starts])
      reached = np.arange(steps)[None] >= np.array(starts)[:, None]
      theta += (success[:, None] * reached).mean(axis=0) * (1 - p)
    return number

  assert [updates(h, [0]) for h in (4, 8)] == [28, 206]
  assert [updates(h, range(h)) for h in (4, 8, 12, 16)] == [34, 129, 281, 489]


def test_sppo_by_a_judge_and_by_rewards_agree_where_the_judge_is_bradley_and_terry():
  rewards = np.array([0.3, -1.0, 2.0, 0.7, 0.0, 0.0, 1.0, 3.0], np.float32)
  gap = rewards.reshape(2, 4)[:, :, None] - rewards.reshape(2, 4)[:, None]
  x = {
    'mask': np.ones((8, 1), bool),
    'logp': np.zeros((8, 1), np.float32),
    'reference_logp': -np.ones((8, 1), np.float32),
    'group_ids': np.repeat([0, 1], 4),
    'valid': np.arange(8) != 5,
  }
  for knobs in ({}, {'with_itself': False, 'extremes': False}):
    by_reward, _ = methods.sppo(**knobs).loss(rewards=rewards, **x)
    wins = (1 / (1 + np.exp(-gap))).reshape(8, 4)
    judged, _ = methods.sppo(by='wins', **knobs).loss(wins=wins, **x)
    np.testing.assert_allclose(judged, by_reward, rtol=1e-5)
