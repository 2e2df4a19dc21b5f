"""Distillation: losses against NumPy, exact gradients, which rows a batch has, schedules."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import teacher_consistency
from polgrad import collect, methods, optim
from polgrad.arrays import shape_of
from polgrad.collect import replay
from polgrad.losses import divergences, logit_stats
from polgrad.models.token_stats import token_stats
from polgrad.sampling import behavior_policies
from polgrad.tabular import enumerable, estimators
from polgrad.types import Batch
from tests.runs import method_of


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


RNG = np.random.default_rng(3)
B, T, V = 3, 5, 4
MASK = np.arange(T) < np.array([[5], [3], [1]])


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def arrays():
  """Logits of student, old student and teacher, and log-probs of the sampled tokens under them."""
  logits = {name: RNG.normal(size=(B, T, V)) for name in ('new', 'old', 'teacher')}
  tokens = RNG.integers(V, size=(B, T))
  logp = {
    name: np.take_along_axis(log_softmax(x), tokens[..., None], -1)[..., 0]
    for name, x in logits.items()
  }
  return logits, logp, tokens


def token_mean(x):
  return x[MASK].mean()


def kl(p, q):
  return (np.exp(p) * (p - q)).sum(-1)


def gkd(s, t, _):
  mixture = np.logaddexp(s, t) - np.log(2)
  return token_mean(kl(t, mixture) / 2 + kl(s, mixture) / 2)


def distillm(s, t, _):
  return token_mean(kl(s, np.log(0.9 * np.exp(t) + 0.1 * np.exp(s))))


def sampled_distillation(s, t, logp):
  advantage = np.clip(logp['teacher'] - logp['old'], -10, 10)
  ratio = np.exp(logp['new'] - logp['old'])
  loss = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2))
  return np.mean([row[m].mean() for row, m in zip(loss, MASK)])


def lightning_opd(s, t, logp):
  return sampled_distillation(s, t, logp)  # what differs is who drew the tokens, and when


def returns(reward, discount, own, divided):
  found = np.zeros((B, T))
  for b, t in zip(*np.nonzero(MASK)):
    later = [s for s in range(t + (not own), T) if MASK[b, s]]
    powers = [discount ** (s - t) for s in later]
    total = sum(d * reward[b, s] for d, s in zip(powers, later))
    found[b, t] = total / len(later) if divided and later else total
  return found


def behavior(logp, weight=0.2):
  return np.log((1 - weight) * np.exp(logp['old']) + weight * np.exp(logp['teacher']))


def minillm(s, t, logp):
  reward = np.clip((logp['teacher'] - logp['old']) / 0.5, -100, 100)
  found = returns(reward, 0.95, own=True, divided=True)
  found = (found - found[MASK].mean()) / np.sqrt(found[MASK].var(ddof=1) + 1e-8)
  ratio = np.exp(logp['new'] - behavior(logp))
  loss = np.maximum(-found * ratio, -found * np.clip(ratio, 0.8, 1.2))
  return token_mean(loss) + token_mean(kl(s, t))


def minillm_paper(s, t, logp):
  found = returns(logp['teacher'] - logp['old'], 1.0, own=False, divided=False)
  loss = kl(s, t) - np.exp(logp['new'] - behavior(logp)) * found
  return np.where(MASK, loss, 0).sum() / B


def seq_kd(s, t, logp):
  return -token_mean(logp['new'])


def top_k_distillation(s, t, _):
  return token_mean(kl(s, t))  # 16 of 4 tokens are all


def stored_distillation(s, t, _):
  """Of the three likeliest tokens that `listed` has, and of the fourth as the others."""
  return token_mean(kl(t, s))


def mean_teacher(s, t, logp):
  return token_mean(-logp['new'] + kl(t, s))


def random_teacher(s, t, _):
  return token_mean(kl(t, s))


def ps_kd(s, t, logp):
  return token_mean(-(1 - 0.4) * logp['new'] + 0.4 * kl(t, s))  # at the second of four stages


def iw_opd(s, t, logp):
  advantage, total = logp['teacher'] - logp['old'], 0.0
  for b, row in enumerate(np.abs(np.where(MASK, advantage, 0))):
    for i in np.nonzero(MASK[b])[0]:
      weight = 1 + 0.5 * (1 - row[:i].sum() / row.sum())
      total -= weight * advantage[b, i] * logp['new'][b, i]
  return total / MASK.sum()


def entropy_aware_opd(s, t, _):
  unsure = -(np.exp(t) * t).sum(-1) > 0.8
  assert 0 < unsure[MASK].sum() < MASK.sum()
  return token_mean(kl(s, t) + unsure * kl(t, s))


ORACLES = {
  f.__name__: f
  for f in (
    *(gkd, distillm, sampled_distillation, minillm, minillm_paper, seq_kd, top_k_distillation),
    *(mean_teacher, random_teacher, ps_kd, lightning_opd, stored_distillation),
    *(iw_opd, entropy_aware_opd),
  )
}


@pytest.mark.parametrize('name', ORACLES)
def test_the_loss_is_that_of_its_paper(name, x64):
  logits, logp, tokens = arrays()
  known = dict(
    tokens=tokens,
    logits=logits['new'],
    teacher_logits=logits['teacher'],
    logp=logp['new'],
    behavior_logp=behavior(logp) if name.startswith('minillm') else logp['old'],
    proximal_logp=logp['old'],
    teacher_logp=logp['teacher'],
    teacher_top_ids=np.argsort(-logits['teacher'])[..., :3].reshape(B, -1),
    teacher_top_log_probs=-np.sort(-log_softmax(logits['teacher']))[..., :3].reshape(B, -1),
  )
  method = method_of(name)
  step = 50 if name == 'ps_kd' else 0
  loss, _ = method.loss(
    mask=MASK, step=step, **{k: x for k, x in known.items() if k in method.reads | {'tokens'}}
  )
  s, t = log_softmax(logits['new']), log_softmax(logits['teacher'])
  # The bucket of `top_k` gives the other tokens at least 1e-7.
  tolerance = 1e-5 if name == 'top_k_distillation' else 1e-6
  np.testing.assert_allclose(loss, ORACLES[name](s, t, logp), rtol=tolerance)
  assert all(shape_of(k) for k in method.reads)


def test_a_teacher_with_more_rows_of_padding_is_compared_over_the_ids_of_both(x64):
  random = np.random.default_rng(8)
  hidden, other = random.normal(size=(B, T, 3)), random.normal(size=(B, T, 2))
  own, teacher = random.normal(size=(3, 5)), random.normal(size=(2, 7))
  tokens = random.integers(5, size=(B, T))
  found = token_stats(
    jnp.asarray(hidden),
    jnp.asarray(tokens),
    lambda x: x @ own,
    stats={'kl': divergences.reverse_kl, 'logp': logit_stats.logp},
    teacher_hidden=jnp.asarray(other),
    teacher_unembed=lambda x: x @ teacher,
  )
  s, t = log_softmax(hidden @ own), log_softmax((other @ teacher)[..., :5])
  np.testing.assert_allclose(found['kl'][:, 1:], kl(s, t)[:, :-1], rtol=1e-5)
  logp = np.take_along_axis(s[:, :-1], tokens[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(found['logp'][:, 1:], logp, rtol=1e-5)


POLICY = enumerable.table(3, 3)


def setting(seed=0):
  """Logits of student and teacher, [P, V], and the world of sequences of three tokens."""
  rng = np.random.default_rng(seed)
  student, teacher = rng.normal(size=(2, 13, 3))
  one = estimators.Setting(
    policy=POLICY,
    rewards=np.zeros(27),
    params=jnp.asarray(student),
    behavior=jnp.asarray(student),
    anchors={'teacher': jnp.asarray(teacher)},
    values=np.zeros((27, 3)),
  )
  return one, jnp.asarray(student), jnp.asarray(teacher)


def sequence_kl(params, teacher):
  logp, other = (jnp.sum(enumerable.logp(POLICY, x), axis=1) for x in (params, teacher))
  return jnp.sum(jnp.exp(logp) * (logp - other))


def mean_gradient(method, one):
  credit, objective = method.bound()
  [found] = estimators.gradient_distributions([one], credit, objective, rows_per_prompt=1)
  return -found.mean


def test_the_paper_s_parts_are_the_exact_gradient_of_the_kl_of_sequences(x64):
  one, student, teacher = setting()
  exact = jax.grad(sequence_kl)(student, teacher).ravel()
  found = mean_gradient(methods.minillm_paper(teacher_weight=0.0), one)
  np.testing.assert_allclose(found, exact, atol=1e-12)
  # Without the part of later tokens the gradient is another one, but not a far one.
  single = mean_gradient(method_of('on_policy_distillation'), one) * 3  # a mean over three tokens
  gap = np.linalg.norm(single - exact) / np.linalg.norm(exact)
  assert 0.05 < gap < 0.5


def test_sampled_log_ratios_have_the_gradient_of_the_exact_divergence(x64):
  one, _, _ = setting()
  found = mean_gradient(methods.sampled_distillation(clip=np.inf, eps=np.inf), one)
  np.testing.assert_allclose(
    found, mean_gradient(method_of('on_policy_distillation'), one), atol=1e-12
  )
  # So have IW-OPD without weights of positions, and EOPD if no teacher counts as unsure.
  for method in (methods.iw_opd(strength=0.0), methods.entropy_aware_opd(threshold=np.inf)):
    np.testing.assert_allclose(mean_gradient(method, one), found, atol=1e-12)


def test_every_sampled_method_rests_at_the_teacher(x64):
  one, _, teacher = setting()
  at_teacher = one._replace(params=teacher, behavior=teacher)
  for name in ('gkd', 'distillm', 'minillm_paper', 'sampled_distillation', 'seq_kd'):
    np.testing.assert_allclose(mean_gradient(method_of(name), at_teacher), 0, atol=1e-12)


def test_samples_of_an_earlier_student_teach_the_same_at_both_ends(x64):
  """Frozen samples rest at the teacher too, and begin with the same gradient."""
  method = methods.sampled_distillation(clip=np.inf, eps=np.inf)
  one, student, teacher = setting()
  frozen = lambda params: one._replace(params=params, anchors=one.anchors | {'proximal': params})
  fresh = lambda params: one._replace(params=params, behavior=params)
  np.testing.assert_allclose(mean_gradient(method, frozen(teacher)), 0, atol=1e-12)
  np.testing.assert_allclose(
    mean_gradient(method, frozen(student)), mean_gradient(method, fresh(student)), atol=1e-12
  )
  between = (student + teacher) / 2
  a, b = (mean_gradient(method, make(between)) for make in (frozen, fresh))
  assert np.linalg.norm(a - b) > 1e-3 and a @ b > 0


def scores_of(params):
  """The gradient of every token's log-prob, [S, H, P * V]."""
  found = jax.jacobian(lambda x: enumerable.logp(POLICY, x))(params)
  return np.asarray(found).reshape(27, 3, -1)


def test_the_gradient_of_stored_completions_differs_by_a_covariance(x64):
  """The theorems of Lightning OPD, by enumeration; G is the largest norm of a token's score."""
  one, reference, teacher = setting(1)
  method = methods.lightning_opd(clip=np.inf, eps=np.inf)
  for mixed in (0.1, 0.3, 1.0):
    params = reference + mixed * 0.5 * (teacher - reference)
    scores = scores_of(params)
    logp, of_reference, of_teacher = (
      np.asarray(enumerable.logp(POLICY, x)) for x in (params, reference, teacher)
    )
    ratio = np.exp((logp - of_reference).sum(1))
    own, drawn = np.exp(logp.sum(1)), np.exp(of_reference.sum(1))
    advantages = of_teacher - logp
    f = (advantages[:, :, None] * scores).sum(1)
    on, off = own @ f, drawn @ f
    covariance = (drawn * ratio) @ f - (drawn @ ratio) * (drawn @ f)
    np.testing.assert_allclose(off, on - covariance, atol=1e-13)
    bound = np.linalg.norm(scores, axis=-1).max() * np.sqrt(
      (drawn @ np.abs(advantages).sum(1) ** 2) * (drawn @ (ratio - 1) ** 2)
    )
    assert 0 < np.linalg.norm(on - off) <= bound
    # The method has this gradient: rows have three tokens, and it takes the mean over them.
    frozen = one._replace(params=params, anchors=one.anchors | {'proximal': params})
    np.testing.assert_allclose(3 * -mean_gradient(method, frozen), off, atol=1e-12)


def test_another_teacher_than_that_of_the_tuning_has_a_bias_at_the_first_step(x64):
  _, reference, teacher = setting(1)
  _, _, other = setting(2)
  logp, of_teacher, of_other = (
    np.asarray(enumerable.logp(POLICY, x)) for x in (reference, teacher, other)
  )
  drawn, scores = np.exp(logp.sum(1)), scores_of(reference)
  gap = of_teacher - of_other
  bias = drawn @ (gap[:, :, None] * scores).sum(1)
  bound = np.linalg.norm(scores, axis=-1).max() * np.sqrt(drawn @ np.abs(gap).sum(1) ** 2)
  step = lambda towards: np.asarray(
    teacher_consistency.direction(reference, towards, jnp.asarray(drawn))
  ).ravel()
  np.testing.assert_allclose(step(teacher) - step(other), bias, atol=1e-13)
  assert 0.05 < np.linalg.norm(bias) <= bound


def test_a_mixture_of_policies_is_one_of_probabilities():
  student, teacher = jnp.asarray(RNG.normal(size=(2, 6)))
  mixed = behavior_policies.teacher_mixture(student, teacher, teacher_weight=0.25)
  expected = 0.75 * jax.nn.softmax(student) + 0.25 * jax.nn.softmax(teacher)
  np.testing.assert_allclose(np.exp(mixed), expected, rtol=1e-5)
  for weight, one in ((0.0, student), (1.0, teacher)):
    found = behavior_policies.teacher_mixture(student, teacher, teacher_weight=weight)
    np.testing.assert_allclose(found, jax.nn.log_softmax(one), rtol=1e-5)


def test_stages_of_self_distillation():
  values = [
    float(optim.progressive(jnp.asarray(s), every=10, stages=4)) for s in (0, 9, 10, 39, 90)
  ]
  np.testing.assert_allclose(values, [0, 0, 0.4, 0.8, 0.8], rtol=1e-6)
  rest = optim.progressive_rest(jnp.asarray(10), every=10, stages=4)
  np.testing.assert_allclose(rest, 0.6, rtol=1e-6)


def kinds(settings, steps):
  """How often each kind of batch comes in these steps, if fresh ones are stored."""
  stored, found = 0, []
  for step in steps:
    found.append(settings.kind(0, step, stored))
    stored += found[-1] == 'fresh'
  return collections.Counter(found), found


def test_kinds_of_batches_follow_the_students_fraction_and_the_fading_of_its_samples():
  counts, _ = kinds(collect.Mixed(samples_per_prompt=1, student_fraction=0.3), range(2000))
  assert abs(counts['fresh'] / 2000 - 0.3) < 0.03 and not counts['remembered']
  sizes = dict(samples_per_prompt=1, student_fraction=0.0, rise_every=100, fade=1000, memory=5)
  _, found = kinds(collect.Mixed(**sizes), range(1000))
  assert set(found[:100]) == {'given'}
  first, last = (collections.Counter(found[a : a + 200]) for a in (100, 800))
  assert first['fresh'] > first['remembered'] and last['remembered'] > 5 * last['fresh']
  assert last['given'] < 60


def test_remembered_rows_are_those_of_the_memory():
  """Three batches of two rows in a ring of two: the first is forgotten."""
  rows = lambda n: Batch(
    **{k: np.full((2, 1), n, np.int32) for k in ('tokens', 'segment_ids', 'mask')},
    group_ids=np.full(2, n, np.int32),
  )
  memory = replay.empty(rows(0), capacity=2)
  for n in (1, 2, 3):
    memory = replay.stored(memory, rows(n))
  drawn = replay.drawn_rows(memory, 4, np.random.default_rng(0))
  assert sorted(drawn.tokens.ravel()) == sorted(drawn.group_ids) == [2, 2, 3, 3]


def test_a_mixed_batch_refuses_what_it_cannot_have():
  with pytest.raises(ValueError, match='samples_per_prompt=8'):
    collect.Mixed()
  with pytest.raises(ValueError, match='replay'):
    collect.Mixed(samples_per_prompt=1, replay=2, replay_fraction=0.5)
  with pytest.raises(ValueError, match='fade=5 needs a memory'):
    collect.Mixed(samples_per_prompt=1, fade=5)


def test_divergences_of_the_methods_are_parts_that_can_be_exchanged():
  method = methods.gkd()
  names = [name for name in divergences.TABLE if name != 'divergences.jensen_shannon']
  for name in names:
    with method.objective.unlocked():
      method.objective.divergence = {'name': name}
    assert dataclasses.replace(method).bound()[1].divergence.func is divergences.TABLE[name]
