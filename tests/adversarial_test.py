"""GAD: a discriminator whose scalar head gives the rewards; its optimum, and the loss of both models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, evaluate, methods, phases
from polgrad.collect.base import make_annotator
from polgrad.losses import listwise
from polgrad.options import from_text
from polgrad.reward_models import last_score
from polgrad.types import STREAMS, Batch

SAMPLED, GIVEN = STREAMS.index('sampled'), STREAMS.index('demonstration')


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def test_the_best_discriminator_is_the_log_ratio_and_its_rewards_are_those_of_the_reverse_kl(x64):
  """Six sequences; all pairs of a given one and a sample, weighted by their probabilities."""
  random = np.random.default_rng(0)
  student = jnp.asarray(random.normal(size=6))
  teacher = jax.nn.softmax(jnp.asarray(random.normal(size=6)))
  own = jax.nn.softmax(student)
  pairs = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2)  # given, sample
  stream, groups = np.tile([GIVEN, SAMPLED], 36), np.repeat(np.arange(36), 2)

  def loss(scores):
    rows = listwise.given_above(scores[pairs.ravel()], stream, groups).reshape(36, 2)
    assert rows.shape == (36, 2)
    return jnp.sum(rows.sum(1) * teacher[pairs[:, 0]] * own[pairs[:, 1]])

  best = jnp.log(teacher / own) + 3.0
  np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-12)
  assert loss(best) < loss(best + 0.1 * jnp.asarray(random.normal(size=6)))
  step = jax.grad(lambda x: jnp.sum(jax.lax.stop_gradient(own * best) * jax.nn.log_softmax(x)))
  kl = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - jnp.log(teacher)))
  np.testing.assert_allclose(step(student), -jax.grad(kl)(student), atol=1e-12)


def test_the_loss_of_the_discriminator_is_a_mean_over_the_samples_of_a_group(x64):
  random = np.random.default_rng(1)
  score = random.normal(size=7)
  stream = np.array([SAMPLED, SAMPLED, GIVEN, SAMPLED, GIVEN, SAMPLED, SAMPLED])
  groups = np.array([0, 0, 0, 1, 1, 2, 2])  # the last group has nothing given
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  want = np.zeros(7)
  want[0] = -np.log(sigmoid(score[2] - score[0])) / 2
  want[1] = -np.log(sigmoid(score[2] - score[1])) / 2
  want[3] = -np.log(sigmoid(score[4] - score[3]))
  found = listwise.given_above(jnp.asarray(score), jnp.asarray(stream), jnp.asarray(groups))
  np.testing.assert_allclose(found, want, rtol=1e-6)


def gad():
  return methods.gad(learning_rate=1e-4, samples_per_prompt=3, warm_up=5)


def test_the_student_imitates_first_and_then_learns_from_the_scores(x64):
  random = np.random.default_rng(2)
  stream = np.tile([SAMPLED] * 3 + [GIVEN], 2)
  mask = random.random((8, 4)) < 0.7
  mask[:, 0] = True
  logp, old, reference = -random.random((3, 8, 4))
  score = random.normal(size=8)
  arrays = dict(
    logp=logp, behavior_logp=old, proximal_logp=old, reference_logp=reference, stream=stream,
    discriminator_head_score=score, group_ids=np.repeat([0, 1], 4), rewards=np.zeros(8),
    valid=np.ones(8, bool),
  )  # fmt: skip
  arrays = {k: x for k, x in arrays.items() if k in gad().reads | {'rewards', 'valid'}}
  rows = lambda x: np.array([row[m].mean() for row, m in zip(x, mask)])
  given = stream == GIVEN
  before, _ = gad().loss(mask=mask, step=4, **arrays)
  np.testing.assert_allclose(before, -rows(logp)[given].mean(), rtol=1e-6)
  advantages = np.zeros(8)
  for group in (slice(0, 3), slice(4, 7)):
    own = score[group]
    advantages[group] = (own - own.mean()) / (own.std(ddof=1) + 1e-6)
  ratio, a = np.exp(logp - old), advantages[:, None]
  policy = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
  k3 = np.exp(reference - logp) - 1 - (reference - logp)
  want = (rows(policy) + 0.001 * rows(k3))[~given].mean()
  after, _ = gad().loss(mask=mask, step=5, **arrays)
  np.testing.assert_allclose(after, want, rtol=1e-6)


def test_scores_are_those_of_the_scalar_head_after_the_last_token():
  run = build.build(from_text('method=gad,task=addition,model=tiny,smoke,warm_start=0'))
  assert run.policy.config.value_head  # also where only the discriminator reads it
  phase = run.phases['train']
  random = np.random.default_rng(3)
  begin, width = phase.collect.prompt_length, phase.collect.length
  column = np.arange(width)[None]
  ends = begin + np.array([[1], [3], [5], [2]])
  seen = (column >= 2) & (column < ends)
  batch = Batch(
    tokens=np.where(seen, random.integers(2, 14, seen.shape), 0).astype(np.int32),
    segment_ids=seen.astype(np.int32),
    mask=seen & (column >= begin),
    proximal_logp=np.zeros(seen.shape, np.float32),
  )
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    move = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    anchors = state.anchors | {'discriminator': jax.tree.map(move, state.anchors['discriminator'])}
    state = state.replace(anchors=anchors)
    annotate = make_annotator(evaluate.context(run, phase, 0), 0.8)
    found = annotate(state, batch)['discriminator_head_score']
    # Rows that begin at column 0, as a reward model reads them.
    tokens = np.stack([np.roll(row, -2) for row in batch.tokens])
    segments = np.stack([np.roll(row, -2) for row in batch.segment_ids])
    want = jax.jit(lambda p, *x: last_score(run.policy, p, *x))(
      anchors['discriminator'], tokens, segments
    )
  np.testing.assert_allclose(found, want, atol=1e-5)
  assert np.ptp(found) > 1e-3


def test_a_head_that_is_not_there_is_refused():
  config = from_text('method=gad,task=addition,model=tiny,smoke,warm_start=0')
  config.model.value_head = False
  with pytest.raises(ValueError, match=r'values are read, but config.model.value_head is False'):
    build.build(config)
