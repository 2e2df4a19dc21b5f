"""Toys of self-distillation, random teachers, stored completions, several teachers and one-token
rollouts, with the numbers that are known of them. All are in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import teacher_consistency
from polgrad import methods
from polgrad.losses import logit_stats
from polgrad.tabular import enumerable
from tests.runs import method_of

pytestmark = pytest.mark.usefixtures('fast_programs')


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def network(random, *widths):
  """Weights and biases of a network with ReLU."""
  matrix = lambda pair: jnp.asarray(random.normal(size=pair) * np.sqrt(2 / pair[0]))
  return [(matrix(pair), jnp.zeros(pair[1])) for pair in itertools.pairwise(widths)]


def features(params, x):
  """What the last layer reads."""
  for weight, bias in params[:-1]:
    x = jax.nn.relu(x @ weight + bias[None])
  return x


def outputs(params, x):
  weight, bias = params[-1]
  return features(params, x) @ weight + bias[None]


def blobs(random, count, width, *, apart=1.0):
  """Points around ten centres, and the numbers of these."""
  centres = apart * random.normal(size=(10, width))

  def draw():
    labels = random.integers(10, size=count)
    return centres[labels] + random.normal(size=(count, width)), labels

  return draw


def test_what_the_model_thought_an_epoch_ago_calibrates_it():
  """Blobs in 16 dimensions with a fifth of the labels drawn at random (arXiv:2006.12000).

  Measured on 2000 other points with their true labels; the calibration error is of 15 bins. P comes
  from the training pass of the epoch before, as in the release.
  """
  epochs, batch = 60, 50
  random = np.random.default_rng(0)
  draw = blobs(random, 500, 16)
  x, labels = draw()
  labels = np.where(random.random(500) < 0.2, random.integers(10, size=500), labels)
  tests = [draw() for _ in range(4)]
  test_x, test_labels = (np.concatenate(part) for part in zip(*tests))
  optimizer = optax.adam(1e-3)

  @functools.partial(jax.jit, static_argnums=0)
  def train(last, params, order):
    """(parameters at the end) of PS-KD with `a` in the last stage; 0 is plain cross-entropy."""
    method = methods.ps_kd(steps=epochs, stages=epochs, last=last)

    def epoch(carry, given):
      stage, rows = given
      params, state, before = carry

      def step(carry, rows):
        params, state, before = carry

        def loss(params):
          z = outputs(params, jnp.asarray(x)[rows])
          log_probs, tokens = jax.nn.log_softmax(z), jnp.asarray(labels)[rows, None]
          arrays = dict(logits=z, teacher_logits=jnp.log(before[rows]))
          arrays |= dict(logp=jnp.take_along_axis(log_probs, tokens, axis=1))
          arrays |= dict(tokens=tokens, stream=jnp.zeros(len(rows), jnp.int32))
          mask = np.ones((len(rows), 1), bool)
          # One token a row.
          of_rows = {k: v[:, None] if k.endswith('logits') else v for k, v in arrays.items()}
          read = {k: v for k, v in of_rows.items() if k in method.reads | {'tokens'}}
          return method.loss(mask=mask, step=stage, **read)[0], jnp.exp(log_probs)

        gradient, found = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        return (params, state, before.at[rows].set(found)), ()

      return jax.lax.scan(step, (params, state, before), rows)[0], ()

    start = params, optimizer.init(params), jnp.eye(10)[labels] * (1 - 1e-9) + 1e-10
    return jax.lax.scan(epoch, start, (jnp.arange(epochs), order))[0][0]

  params = network(np.random.default_rng(1), 16, 256, 256, 10)
  order = np.stack([random.permutation(500).reshape(-1, batch) for _ in range(epochs)])
  measured = {}
  for last in (0.0, 0.8):
    p = np.asarray(jax.nn.softmax(outputs(train(last, params, order), test_x)))
    right, sure = p.argmax(1) == test_labels, p.max(1)
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs((sure - right)[bins == k].sum()) for k in range(15)]
    nll = -np.log(p[np.arange(len(p)), test_labels]).mean()
    measured[last] = right.mean(), nll, sum(gaps) / len(p)
  (plain, plain_nll, plain_gap), (soft, soft_nll, soft_gap) = measured[0.0], measured[0.8]
  assert soft_nll < plain_nll - 0.02 and soft_gap < plain_gap - 0.01 and soft > plain - 0.01


def test_a_student_of_a_random_teacher_has_better_features_than_it_began_with():
  """A linear probe of the features, on ten blobs in 8 dimensions seen through 64 (arXiv:2302.12091)."""
  random = np.random.default_rng(0)
  first, second = random.normal(size=(8, 64)) / np.sqrt(8), random.normal(size=(64, 64)) / 4
  draw = blobs(random, 1000, 8, apart=1.5)
  seen = lambda drawn: (np.tanh(np.tanh(drawn[0] @ first) @ second), drawn[1])
  (x, labels), (test_x, test_labels) = seen(draw()), seen(draw())
  widths = (64, 128, 64, 32)
  teacher, other = (network(np.random.default_rng(k), *widths) for k in (1, 2))
  optimizer = optax.adam(1e-3)
  method = method_of('random_teacher')

  def loss(params, rows):
    z, t = (outputs(p, rows)[:, None] for p in (params, teacher))
    return method.loss(
      mask=np.ones((len(rows), 1), bool), logp=z[..., 0], logits=z, teacher_logits=t
    )[0]

  @jax.jit
  def trained(params, order):
    def step(carry, rows):
      params, state = carry
      gradient = jax.grad(loss)(params, jnp.asarray(x)[rows])
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates), state), ()

    return jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]

  def probe(params):
    f, g = (np.asarray(features(params, points)) for points in (x, test_x))
    f, g, answers = f - f.mean(0), g - f.mean(0), np.eye(10)[labels] - np.eye(10)[labels].mean(0)
    weight = np.linalg.solve(f.T @ f + 10 * np.eye(f.shape[1]), f.T @ answers)
    return ((g @ weight + np.eye(10)[labels].mean(0)).argmax(1) == test_labels).mean()

  order = random.integers(1000, size=(400, 64))
  found = {}
  for mixed in (0.6, 1.0):
    start = jax.tree.map(lambda t, o, m=mixed: (1 - m) * t + m * o, teacher, other)
    found[mixed] = probe(start), probe(trained(start, order))
  assert np.mean([after - before for before, after in found.values()]) > 0.005
  assert found[0.6][1] > probe(teacher)
  # A student that begins at the teacher stays there.
  value, gradient = jax.value_and_grad(loss)(teacher, jnp.asarray(x[:8]))
  np.testing.assert_allclose(value, 0, atol=1e-12)
  assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) < 1e-12


POLICY = enumerable.table(3, 3)


def total(params):
  """Log-probabilities of all sequences."""
  return jnp.sum(enumerable.logp(POLICY, params), axis=1)


def kl(params, teacher):
  return jnp.sum(jnp.exp(total(params)) * (total(params) - total(teacher)))


def published():
  """Student, its teacher and another teacher, of which the numbers below are known."""
  # Of the random numbers the shortest prefixes have the first rows.
  first, second, _ = POLICY.tokens.T
  order = np.zeros(13, int)
  order[POLICY.prefixes] = np.stack([0 * first, 1 + first, 4 + 3 * first + second], axis=1)
  random = np.random.default_rng(1)
  student, one, two = (jnp.asarray(random.normal(size=(13, 3))[order]) for _ in range(3))
  teacher = student + 0.7 * one
  return student, teacher, teacher + 0.5 * two


def test_later_tokens_have_a_seventh_of_the_gradient():
  """Of KL(student || teacher) of sequences; the rest is that of each token (arXiv:2306.08543)."""
  student, teacher, _ = published()
  whole = -jax.grad(kl)(student, teacher)
  single = teacher_consistency.direction(student, teacher, jnp.exp(total(student)))
  gap = jnp.linalg.norm(whole - single) / jnp.linalg.norm(whole)
  np.testing.assert_allclose(gap, 0.14, atol=5e-3)


def test_another_teacher_than_that_of_the_tuning_biases_the_gradient_as_published():
  """|E sum_t D_t grad log pi_t| is .186 and at most G sqrt(E (sum |D|)^2) = 1.02 (arXiv:2604.13010)."""
  student, teacher, other = published()
  ratio = enumerable.logp(POLICY, teacher) - enumerable.logp(POLICY, other)
  probability = jnp.exp(total(student))
  bias = jax.grad(lambda x: probability @ jnp.sum(ratio * enumerable.logp(POLICY, x), axis=1))(
    student
  )
  scores = jax.jacobian(lambda x: enumerable.logp(POLICY, x))(student).reshape(27, 3, -1)
  largest = jnp.max(jnp.linalg.norm(scores, axis=2))
  bound = largest * jnp.sqrt(probability @ jnp.sum(jnp.abs(ratio), axis=1) ** 2)
  np.testing.assert_allclose(jnp.linalg.norm(bias), 0.186, atol=5e-4)
  np.testing.assert_allclose(bound, 1.02, atol=5e-3)


def test_fresh_and_stored_completions_descend_the_divergence_as_published():
  """KL(student || teacher) after 50, 200 and 2000 exact steps of rate 1 (arXiv:2604.13010)."""
  student, teacher, _ = published()

  @functools.partial(jax.jit, static_argnums=0)
  def descend(frozen):
    def step(params, _):
      weight = jnp.exp(total(student if frozen else params))
      params = params + teacher_consistency.direction(params, teacher, weight)
      return params, kl(params, teacher)

    return jax.lax.scan(step, student, length=2000)[1]

  np.testing.assert_allclose(kl(student, teacher), 0.231, atol=5e-4)
  numbers_of = {False: (0.0056, 3.4e-4, 5e-12), True: (0.0055, 5.9e-4, 1e-10)}
  for frozen, numbers in numbers_of.items():
    found = np.asarray(descend(frozen))[[49, 199, 1999]]
    for value, number, digits in zip(found, numbers, (2, 2, 1)):
      assert float(f'{value:.{digits - 1}e}') == number


def test_the_spread_of_one_token_rollouts_falls_as_the_root_of_their_number():
  """Deviation of the gradient by the logit of the data's token, of 16 and 256 drawn tokens
  (arXiv:2509.26313). The loss is the expectation over them, so it has none."""
  logits, token = np.random.default_rng(0).normal(size=5), 2
  p = np.exp(logits) / np.exp(logits).sum()
  rewards = np.where(np.arange(5) == token, 1.0, -0.1)
  each = -rewards[:, None] * (np.eye(5) - p)  # of a drawn token, by the logits
  mean = p @ each
  exact = functools.partial(logit_stats.one_token_rollout, beta=-0.1, temperature=1.0)
  gradient = jax.grad(lambda z: exact(z, jnp.array(token)))(jnp.asarray(logits))
  np.testing.assert_allclose(gradient, mean, atol=1e-15)
  deviation = np.sqrt(p @ each**2 - mean**2)
  assert deviation.argmax() == token
  np.testing.assert_allclose(deviation[token] / np.sqrt([16, 256]), [0.074, 0.0186], rtol=4e-3)


def test_several_teachers_share_one_bias_and_average_the_others():
  """DYPO (arXiv:2604.08926): E|bias|^2 = |shared|^2 + sigma^2 / m of m independent teachers."""
  random = np.random.default_rng(0)
  method, size = method_of('dypo'), 6
  policy = np.full(size, 1 / size)

  def imitated(z, token):
    """The loss of a prompt that no sample solved, whose demonstration is one token."""
    logp = jnp.zeros((5, 1)).at[4, 0].set(jax.nn.log_softmax(z)[token])
    rewards, group = np.array([0.0, 0, 0, 0, 1]), np.zeros(5, int)
    arrays = dict(logp=logp, rewards=rewards, group_ids=group, stream=np.array([1, 1, 1, 1, 0]))
    zero = np.zeros((5, 1))
    arrays |= dict(behavior_logp=zero, proximal_logp=zero, reference_logp=zero)
    read = {k: v for k, v in arrays.items() if k in method.reads}
    return method.loss(mask=np.ones((5, 1), bool), **read)[0]

  each = jax.jit(jax.vmap(jax.grad(imitated), (None, 0)))
  gradients = each(jnp.zeros(size), jnp.arange(size))
  np.testing.assert_allclose(gradients, policy - np.eye(size), atol=1e-7)
  centred = lambda x: x - x.mean(axis=-1, keepdims=True)
  shared = 0.01 * centred(random.normal(size=size))
  half = 0.02 * centred(random.normal(size=(2, size)))
  noise = np.concatenate([half, -half])  # each with probability 1/4
  sigma = np.square(noise).sum(1).mean()
  for m in (1, 2, 4):
    drawn = [noise[list(k)].mean(0) for k in itertools.product(range(4), repeat=m)]
    bias = (policy + shared + np.array(drawn)) @ np.asarray(gradients)
    found = np.square(bias).sum(1).mean()
    np.testing.assert_allclose(found, shared @ shared + sigma / m, rtol=1e-5)
  # The published instance: 50 numbers, deviation 0.3 of what is shared and 0.5 of the rest.
  shared = 0.3 * np.random.default_rng(0).normal(size=50)
  numbers = [shared @ shared + 50 * 0.25 / m for m in (1, 2, 4, 8)]
  np.testing.assert_allclose(numbers, [16.31, 10.06, 6.94, 5.37], atol=5e-3)
