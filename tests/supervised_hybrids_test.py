"""Supervised losses and their hybrids: against NumPy in float64, and numbers of their papers."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import credit, methods, objectives, optim, registry
from polgrad.losses import aggregation, logit_stats, penalties, weights
from polgrad.models.token_stats import Rows, token_stats
from polgrad.registry import bind
from polgrad.types import Batch, Outputs
from tests.policy_gradient import harness
from tests.runs import method_of


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


RNG = np.random.default_rng(5)
B, T, V = 3, 7, 4
MASK = np.arange(T) < np.array([[7], [4], [1]])
LOGITS = RNG.normal(size=(B, T, V)) + 0.7
TOKENS = RNG.integers(V, size=(B, T))
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
LOGP = np.take_along_axis(LOG_PROBS, TOKENS[..., None], -1)[..., 0]
TEACHER_LOGITS = 2 * RNG.normal(size=(B, T, V))
TARGETS = np.exp(TEACHER_LOGITS) / np.exp(TEACHER_LOGITS).sum(-1, keepdims=True)
STREAM = np.array([0, 1, 0])
TEACHER = LOGP + RNG.uniform(-0.4, 0.4, size=LOGP.shape)


def label_smoothing():
  target = 0.9 * np.eye(V)[TOKENS] + 0.1 / V
  normalizer = np.log(np.exp(LOGITS).sum(-1))
  return (-(target * LOG_PROBS).sum(-1) + 1e-4 * normalizer**2)[MASK].mean()


def dft():
  return (-np.exp(LOGP) * LOGP)[MASK].mean()


def iq_learn():
  """Also through explicit rewards: the logit of the token less the next value."""
  value = np.log(np.exp(LOGITS).sum(-1))
  total = 0.0
  for b in range(B):
    n = MASK[b].sum()
    for t in range(n):
      following = value[b, t + 1] if t + 1 < n else 0.0
      total += 0.1 * (LOGITS[b, t, TOKENS[b, t]] - following) ** 2 - LOGP[b, t]
  return total / MASK.sum()


def implied_rewards(rows):
  """The mean of delta^2 over the tokens of these rows."""
  value, found = np.log(np.exp(LOGITS).sum(-1)), []
  for b in rows:
    after = 0.0
    for t in reversed(range(MASK[b].sum())):
      found.append((LOGITS[b, t, TOKENS[b, t]] - after) ** 2)
      after = value[b, t]
  return np.mean(found)


def iq_learn_online():
  """Row 1 was sampled, the others are answers."""
  answers = MASK & (STREAM == 0)[:, None]
  return -LOGP[answers].mean() + 0.1 * (0.9 * implied_rewards([0, 2]) + 0.1 * implied_rewards([1]))


def unlikelihood():
  total = 0.0
  for b in range(B):
    for t in range(MASK[b].sum()):
      earlier = {int(token) for token in TOKENS[b, :t]} - {int(TOKENS[b, t])}
      total -= LOGP[b, t] + sum(np.log(1 - np.exp(LOG_PROBS[b, t, c])) for c in earlier)
  return total / MASK.sum()


def elr_averaged():
  inner = (np.exp(LOG_PROBS) * TARGETS).sum(-1)
  return (-LOGP + 3 * np.log(1 - inner))[MASK].mean()


def repeats(row, n):
  """Which tokens of a row lie inside an n-gram that occurred before."""
  found, seen = np.zeros(len(row), bool), set()
  for j in range(len(row) - n + 1):
    gram = tuple(row[j : j + n])
    found[j : j + n] |= gram in seen
    seen.add(gram)
  return found


def bfs_prover():
  """Of three right rows the one with the middle likelihood is kept."""
  surprise = [-LOGP[b, : MASK[b].sum()].mean() for b in range(B)]
  row = np.argsort(surprise)[1]
  return surprise[row]


def pear_weights(block):
  """For each token the product over the tokens after its block, with explicit loops."""
  found = np.ones((B, T))
  for b in range(B):
    n = MASK[b].sum()
    delta = np.clip(LOGP[b] - TEACHER[b], -0.08, 0.3)
    for t in range(1, n + 1):
      end = next(e for e in range(t, n + 1) if e % block == 0 or e == n)
      found[b, t - 1] = 0.999 ** (n - end) * np.exp(delta[end:n].sum())
  return np.clip(found, 0.1, 10)


def pear():
  return (-pear_weights(1) * LOGP)[MASK].mean()


def pear_sequence():
  delta = np.where(MASK, np.clip(LOGP - TEACHER, -0.08, 0.3), 0).sum(1, keepdims=True)
  return (-np.clip(np.exp(delta), 0.1, 10) * LOGP)[MASK].mean()


ORACLES = {
  f.__name__: f
  for f in (
    label_smoothing,
    dft,
    iq_learn,
    iq_learn_online,
    elr_averaged,
    unlikelihood,
    bfs_prover,
    pear,
    pear_sequence,
  )
}


@pytest.mark.parametrize('name', ORACLES)
def test_the_loss_is_that_of_its_paper(name, x64):
  known = dict(tokens=TOKENS, logits=LOGITS, logp=LOGP, behavior_logp=TEACHER, rewards=np.ones(B))
  known |= dict(teacher_logits=TEACHER_LOGITS, stream=STREAM)
  method = method_of(name)
  loss, _ = method.loss(
    mask=MASK, step=0, **{k: x for k, x in known.items() if k in method.reads | {'tokens'}}
  )
  np.testing.assert_allclose(loss, ORACLES[name](), rtol=1e-6)


# Published constants, as defaults of arguments.
CONSTANTS = {
  'chord': dict(warmup=200, decay=400, peak=0.5, valley=0.02, eps=0.2),
  'distillm': dict(skew=0.1, rise=0.1),
  'dypo': dict(alpha=0.5, beta=1.0, imitation=1.0, limit=0),
  'elr': dict(coefficient=3.0, decay=0.7),
  'elr_plus': dict(coefficient=3.0, decay=0.7, mixing=1.0, mean_decay=0.997),
  'gad': dict(kl_coefficient=0.001, discriminator_rate=1.0),
  'gkd': dict(student_fraction=0.5, teacher_weight=0.5),
  'iq_learn': dict(coefficient=0.1, discount=1.0),
  'label_smoothing': dict(smoothing=0.1, normalizer_coefficient=1e-4),
  'lightning_opd': dict(clip=10.0, eps=0.2),
  'minillm': dict(teacher_weight=0.2, eps=0.2, discount=0.95, epochs=4),
  'pear': dict(block=1, decay=0.999),
  'ps_kd': dict(last=0.8),
  'quark': dict(quantiles=5, kl=0.05, entropy=0.06),
  'relift': dict(imitated=128, failed=0.0, imitation_rate=1.0, entropy_coefficient=0.001),
  'srft': dict(gamma=0.1, imitation=0.5, exploration=0.1, entropy_coefficient=0.001),
  'star': dict(growth=1.2),
  'steer': dict(strength=0.4, top_p=0.9),
  'steer_quark': dict(quantiles=5, strength=0.4, top_p=0.9, weaker_every=2000),
  'uft': dict(hinted=300 / 500, chunks=5, low=0.05, high=0.95, imitation=0.001, eps=0.2),
  'unlikelihood': dict(coefficient=1.0),
  'unlikelihood_sequence': dict(n=4, sampled_weight=0.5),
}


@pytest.mark.parametrize('name', CONSTANTS)
def test_defaults_are_the_published_constants(name):
  found = inspect.signature(methods.TABLE[name]).parameters
  assert {k: found[k].default for k in CONSTANTS[name]} == CONSTANTS[name]


def test_published_constants_that_are_no_arguments():
  assert method_of('gad').collect.keywords['temperature'] == 0.8
  assert method_of('gad').learned['discriminator'].optimizer.max_grad_norm == 0.2
  assert method_of('relift').optimizer.max_grad_norm == 0.7
  assert method_of('relift').further['imitation'].optimizer.max_grad_norm == 1.0


def test_smoothing_moves_the_gradient_to_the_mixed_target_and_the_normalizer_to_zero(x64):
  z, token = jnp.array([0.3, -1.0, 0.8]), jnp.array(1)
  found = jax.grad(lambda z: logit_stats.smoothed_nll(z, token, smoothing=0.3))(z)
  p = np.exp(z) / np.exp(z).sum()
  np.testing.assert_allclose(found, p - [0.1, 0.8, 0.1], atol=1e-15)
  without = logit_stats.smoothed_nll(z, token, smoothing=0.0)
  np.testing.assert_allclose(without, -np.log(p[1]), atol=1e-15)
  padded = jnp.append(z, -jnp.inf)  # a class that does not exist
  same = logit_stats.smoothed_nll(z, token), logit_stats.smoothed_nll(padded, token)
  np.testing.assert_allclose(*same, atol=1e-15)
  found = jax.grad(logit_stats.squared_log_normalizer)(z)
  np.testing.assert_allclose(found, 2 * np.log(np.exp(z).sum()) * p, atol=1e-15)
  with pytest.raises(ValueError, match='smoothing must be in'):
    logit_stats.smoothed_nll(z, token, smoothing=1.0)


def test_the_implied_rewards_of_an_answer_add_up_and_their_gradient_is_that_of_the_logits(x64):
  """The gradient is taken by the logits, through both the likelihood and the values."""
  method = method_of('iq_learn')

  def loss(z):
    logp = jnp.take_along_axis(jax.nn.log_softmax(z), jnp.asarray(TOKENS)[..., None], -1)[..., 0]
    return method.loss(mask=MASK, logits=z, logp=logp, tokens=TOKENS)[0]

  found = np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))
  probs, value = np.exp(LOG_PROBS), np.log(np.exp(LOGITS).sum(-1))
  expected = np.zeros_like(LOGITS)
  for b in range(B):
    n, deltas = MASK[b].sum(), []
    for t in range(n):
      deltas.append(LOGITS[b, t, TOKENS[b, t]] - (value[b, t + 1] if t + 1 < n else 0.0))
      expected[b, t] += probs[b, t] - np.eye(V)[TOKENS[b, t]] * (1 - 0.2 * deltas[t])
      if t + 1 < n:
        expected[b, t + 1] -= 0.2 * deltas[t] * probs[b, t + 1]
    np.testing.assert_allclose(sum(deltas), value[b, 0] + LOGP[b, :n].sum(), atol=1e-13)
  np.testing.assert_allclose(found, expected / MASK.sum(), atol=1e-12)


def test_supervised_losses_have_the_slots_of_policy_gradients(x64):
  """An entropy bonus with a schedule, over the tokens that a selection keeps."""
  entropy = -(np.exp(LOG_PROBS) * LOG_PROBS).sum(-1)
  weighted = registry.Weighted
  objective = objectives.Supervised(
    aggregation=aggregation.token_mean,
    penalties={
      'bonus': weighted(0.5, penalties.negative_entropy),
      'z': weighted(0.1, logit_stats.squared_log_normalizer),
    },
    schedules={'bonus': lambda step: 2.0 ** -jnp.asarray(step)},
    selections={'first': lambda mask: mask & (jnp.cumsum(mask, axis=1) <= 2)},
    only='first',
  )
  assert objective.requires == {'entropy'}
  normalizer = np.log(np.exp(LOGITS).sum(-1))
  out = Outputs(logp=LOGP, entropy=entropy, stats={'z': normalizer**2})
  batch = Batch(tokens=TOKENS, segment_ids=MASK.astype('i4'), mask=MASK)
  terms, metrics = objective.apply(out, batch, objective.init(), step=2)
  first = MASK & (np.arange(T) < 2)
  expected = {'nll': -LOGP, 'bonus': -0.125 * entropy, 'z': 0.1 * normalizer**2}
  for name, x in expected.items():
    np.testing.assert_allclose(terms[name].value(), x[first].mean(), rtol=1e-12)
  np.testing.assert_allclose(metrics['bonus'].value(), -entropy[first].mean(), rtol=1e-12)
  assert dataclasses.replace(objective, only='').stats == objective.stats
  with pytest.raises(ValueError, match='that is the term of the loss'):
    dataclasses.replace(objective, penalties={'nll': weighted(1.0, penalties.k1)}, schedules={})
  with pytest.raises(ValueError, match='schedules names'):
    dataclasses.replace(objective, penalties={})


def test_early_learning_pulls_the_logits_to_the_targets_until_the_floor(x64):
  z, t = jnp.asarray(LOGITS[0, 0]), TARGETS[0, 0]
  fn = lambda z: logit_stats.early_learning(z, jnp.asarray(TEACHER_LOGITS[0, 0]))
  p = np.exp(LOG_PROBS[0, 0])
  expected = -p * (t - t @ p) / (1 - t @ p)
  np.testing.assert_allclose(jax.grad(fn)(z), expected, rtol=1e-10)
  sure = jnp.array([99.0, 0.0, 0.0, 0.0])
  value, found = jax.value_and_grad(lambda z: logit_stats.early_learning(z, sure))(sure)
  np.testing.assert_allclose(value, np.log(1e-4), rtol=1e-12)
  np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize('n', [1, 2, 4])
def test_tokens_repeat_inside_ngrams_that_occurred_before(n, x64):
  rng = np.random.default_rng(n)
  tokens, mask = rng.integers(2, size=(4, 12)), np.zeros((4, 12), bool)
  mask[:, 2:11] = True  # a prompt, and padding
  expected = np.zeros((4, 12))
  for b in range(4):
    expected[b, 2:11] = repeats(tokens[b, 2:11], n)
  np.testing.assert_array_equal(weights.repeated_ngram(tokens, mask, n=n), expected)
  assert 0 < expected.sum() < mask.sum()
  # The loss of samples has all of their tokens in the mean, that of answers all of theirs.
  logp = np.log(rng.uniform(0.1, 0.9, size=mask.shape))
  method = methods.unlikelihood_sequence(n=n)
  stream = np.array([0, 1, 0, 1])
  loss, _ = method.loss(mask=mask, tokens=tokens, logp=logp, stream=stream)
  own, given = mask & (stream == 1)[:, None], mask & (stream == 0)[:, None]
  wanted = (-np.log(1 - np.exp(logp)) * expected)[own].mean() - logp[given].mean()
  np.testing.assert_allclose(loss, wanted / 2, rtol=1e-6)


def test_the_gradient_of_unlikelihood_is_known_and_the_prompt_counts_if_asked(x64):
  z = jnp.asarray(RNG.normal(size=5))
  p, token = np.exp(z) / np.exp(z).sum(), jnp.array(1)
  context, inside = jnp.array([3, 1, 3, 0, -1]), jnp.array([False, True, False, True, False])
  for prompt, earlier in ((False, [0]), (True, [0, 3])):
    fn = functools.partial(logit_stats.unlikelihood, prompt=prompt)
    value, found = jax.value_and_grad(fn)(z, token, context, inside)
    np.testing.assert_allclose(value, -np.log(1 - p[earlier]).sum(), rtol=1e-12)
    expected = sum(p[c] / (1 - p[c]) * (np.eye(5)[c] - p) for c in earlier)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
  # Of two classes it is the cross-entropy of "not c"; a class that is certain meets the floor.
  pair = jnp.array([0.3, -0.4])
  found = logit_stats.unlikelihood(pair, jnp.array(0), jnp.array([1]), jnp.array([True]))
  np.testing.assert_allclose(found, -jax.nn.log_softmax(pair)[0], rtol=1e-12)
  sure = lambda z: logit_stats.unlikelihood(z, token, jnp.array([0]), jnp.array([True]))
  value, found = jax.value_and_grad(sure)(jnp.array([50.0, 0.0]))
  np.testing.assert_allclose(value, -np.log(1e-5), rtol=1e-12)
  np.testing.assert_array_equal(found, 0)
  value, found = jax.value_and_grad(penalties.unlikelihood)(jnp.log(0.8))
  np.testing.assert_allclose([value, found], [-np.log(0.2), 4.0], rtol=1e-12)


def test_the_context_is_the_same_in_chunks_in_packed_rows_and_behind_the_prompt():
  """Statistics of a table of logits by the token before; the second row has two documents."""
  table = jnp.asarray(RNG.normal(size=(V, V)), jnp.float32)
  tokens = jnp.asarray(RNG.integers(V, size=(2, 8)))
  segments = jnp.array([[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 2, 2, 2]])
  mask = (segments > 0) & (jnp.arange(8)[None] > 2)
  settings = dict(
    unembed=lambda h: h,
    stats={'u': functools.partial(logit_stats.unlikelihood, prompt=True)},
    whole=Rows(tokens, segments, mask),
  )
  found = token_stats(table[tokens], tokens, **settings)['u']
  for b, t in np.argwhere(np.asarray(mask)):
    same = np.asarray(segments[b, :t] == segments[b, t])
    earlier = {int(x) for x in tokens[b, :t][same]} - {int(tokens[b, t])}
    log_probs = jax.nn.log_softmax(table[tokens[b, t - 1]])
    expected = -sum(np.log(1 - np.exp(log_probs[c])) for c in earlier)
    np.testing.assert_allclose(found[b, t], expected, rtol=2e-5, atol=1e-6)
  in_chunks = token_stats(table[tokens], tokens, chunk=4, **settings)['u']
  np.testing.assert_allclose(in_chunks, found, rtol=1e-6)
  behind = token_stats(table[tokens][:, 2:], tokens[:, 2:], **settings)['u']
  np.testing.assert_allclose(behind[:, 1:], found[:, 3:], rtol=1e-6)
  gathered = token_stats(table[tokens], tokens, where=mask, most=5, **settings)['u']
  np.testing.assert_allclose(gathered, jnp.where(mask, found, 0), rtol=1e-6)


def test_bag_losses_are_those_of_the_bags_and_of_their_instances(x64):
  scores, rewards = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4))
  mean = rewards.mean(1, keepdims=True)
  whole = ((mean[:, 0] - scores.mean(1)) ** 2).mean()
  each = ((mean - scores) ** 2).mean()
  np.testing.assert_allclose(each, whole + scores.var(1).mean(), rtol=1e-12)
  x = dict(mask=np.ones((12, 1), bool), logp=np.zeros((12, 1)), group_ids=np.arange(12) // 4)
  x |= dict(values_after=scores.reshape(12, 1), rewards=rewards.ravel())
  for r in (0.0, 0.3, 1.0):
    method = methods.bag_loss(candidates=4, instance=r)
    known = {k: v for k, v in x.items() if k in method.reads | {'mask'}}
    expected = (1 - r) * whole + r * each
    np.testing.assert_allclose(method.loss(**known)[0], expected, rtol=1e-6)


@pytest.mark.parametrize('block', [1, 2, 3, 9])
def test_suffix_weights_are_products_over_the_tokens_after_the_block(block, x64):
  found = weights.suffix_importance(LOGP, TEACHER, MASK, block=block)
  np.testing.assert_allclose(found[MASK], pear_weights(block)[MASK], rtol=1e-12)
  if block > T:
    np.testing.assert_array_equal(found[MASK], 1)


def test_suffix_weights_of_successes_are_the_chance_to_succeed_from_there(x64):
  """Two tokens of three; the data are a policy's successes, the weights those of another policy."""
  first, second = (jax.nn.log_softmax(RNG.normal(size=s)) for s in ((2, 3), (2, 3, 3)))
  success = RNG.integers(0, 2, size=(3, 3))
  pairs = np.argwhere(np.ones((3, 3)))
  logp, other = (
    np.stack([first[k][pairs[:, 0]], second[k][pairs[:, 0], pairs[:, 1]]], 1) for k in (0, 1)
  )
  free = dict(decay=1.0, shift_low=-99, shift_high=99, low=0.0, high=np.inf)
  found = weights.suffix_importance(logp, other, np.ones((9, 2), bool), **free)[:, 0]
  chance = np.exp(other[:, 1]).reshape(3, 3)
  mean = (chance * success * np.reshape(found, (3, 3))).sum(1)
  expected = (np.exp(logp[:, 1]).reshape(3, 3) * success).sum(1)
  np.testing.assert_allclose(mean, expected, atol=1e-15)
  rows = weights.row_importance(
    logp, other, np.ones((9, 2), bool), **{k: v for k, v in free.items() if k != 'decay'}
  )
  np.testing.assert_allclose(rows[:, 0], np.exp((logp - other).sum(1)), rtol=1e-12)
  with pytest.raises(ValueError, match='block must be at least 1'):
    weights.suffix_importance(logp, other, np.ones((9, 2), bool), block=0)


@pytest.mark.parametrize(
  ('knobs', 'expected'),
  [
    (
      dict(warmup=200, decay=400, peak=0.5, valley=0.02),
      {0: 0, 100: 0.25, 200: 0.5, 400: 0.26, 600: 0.02, 900: 0.02},
    ),
    (dict(decay=200), {0: 0.9, 100: 0.475, 200: 0.05}),
  ],
)
def test_the_weight_of_demonstrations_rises_and_falls(knobs, expected):
  for step, value in expected.items():
    np.testing.assert_allclose(optim.rise_and_fall(jnp.asarray(step), **knobs), value, atol=1e-6)
    rest = optim.rise_and_fall_rest(jnp.asarray(step), **knobs)
    np.testing.assert_allclose(rest, 1 - value, atol=1e-6)


@pytest.mark.parametrize(
  ('weight', 'fixed_point'),
  [
    (weights.probability, [1, 0, 0]),
    (functools.partial(weights.probability, exponent=0.0), [0.6, 0.3, 0.1]),
    (functools.partial(weights.probability, exponent=0.5), [0.78261, 0.19565, 0.02174]),
    (weights.undecided, [2 / 3, 1 / 3, 0]),
  ],
)
def test_weighted_likelihoods_rest_where_the_theory_says(weight, fixed_point, x64):
  """Of data with frequencies 0.6, 0.3 and 0.1."""
  q = jnp.array([0.6, 0.3, 0.1])

  def step(z, _):
    gradient = weight(jax.nn.log_softmax(z)) * q
    return z + 0.5 * (gradient - jnp.sum(gradient) * jax.nn.softmax(z)), None

  z, _ = jax.lax.scan(step, jnp.zeros(3), length=20000)
  np.testing.assert_allclose(jax.nn.softmax(z), fixed_point, atol=0.002)


@pytest.mark.parametrize(
  ('statistics', 'means'), [('all', [2 / 3, 1 / 3, 0]), ('samples', [1 / 2, 0, 0])]
)
def test_the_group_mean_of_luffy_is_over_all_rows_or_the_samples(statistics, means):
  """Two samples and a demonstration; in the third group the demonstration has no reward either."""
  rewards = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0.0]])
  batch = harness.scored(
    length=2,
    rewards=jnp.asarray(rewards.ravel()),
    group_ids=jnp.repeat(jnp.arange(3), 3),
    stream=jnp.tile(jnp.array([1, 1, 0]), 3),
  )
  method = methods.luffy(max_new_tokens=2, statistics=statistics)
  estimator = bind(method.credit, credit.TABLE)
  credited, _ = credit.assign(estimator, batch, estimator.init())
  found = np.asarray(credited.advantages)[:, 0].reshape(3, 3)
  np.testing.assert_allclose(found, rewards - np.array(means)[:, None], atol=1e-6)
  assert np.asarray(credited.mask).all()


def test_the_demonstration_of_chord_changes_no_advantage_and_stays_in_the_mask():
  rewards = np.array([[0, 1, 0, 1, 1.0], [0, 0, 0, 1, 1]])
  batch = harness.scored(
    length=2,
    rewards=jnp.asarray(rewards.ravel()),
    group_ids=jnp.repeat(jnp.arange(2), 5),
    stream=jnp.tile(jnp.array([1, 1, 1, 1, 0]), 2),
  )
  estimator = bind(method_of('chord').credit, credit.TABLE)
  credited, _ = credit.assign(estimator, batch, estimator.init())
  samples = rewards[:, :4]
  centered = samples - samples.mean(1, keepdims=True)
  expected = centered / (samples.std(1, ddof=1, keepdims=True) + 1e-6)
  found = np.asarray(credited.advantages)[:, 0].reshape(2, 5)[:, :4]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert np.asarray(credited.mask).all()
