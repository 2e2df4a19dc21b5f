"""The mixture of experts against its equations, and the theory of its balancing bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import sharding
from polgrad.models import experts
from polgrad.models.policy import labelled, overlay
from tests.models import tiny

MOE = dict(num_experts=4, experts_per_token=2, balance_rate=1e-3)
E, K, T = 8, 2, 512


def numpy_mixture(x, weights, chosen, gate, up, down):
  """Every token and every expert of it, one after another."""
  x, weights, gate, up, down = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down))
  out = np.zeros_like(x)
  for place in np.ndindex(x.shape[:2]):
    for k, e in enumerate(np.asarray(chosen)[place]):
      inner = x[place] @ gate[e]
      inner = inner / (1 + np.exp(-inner)) * (x[place] @ up[e])
      out[place] += weights[place][k] * (inner @ down[e])
  return out


def problem(rows: int, length: int):
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(0.5 * random.normal(size=shape), jnp.float32)
  logits = normal(rows * length, 4).at[:, 3].add(2.0)  # a crowded expert
  weights, chosen = experts.route(logits, jnp.zeros(4), k=2, normalize=True)
  weights, chosen = (a.reshape(rows, length, 2) for a in (weights, chosen))
  return normal(rows, length, 6), weights, chosen, normal(4, 6, 8), normal(4, 6, 8), normal(4, 8, 6)


def run(*arrays):
  return experts.mixture(*arrays, activation=jax.nn.silu)[0]


def test_the_mixture_is_its_equation():
  arrays = problem(2, 5)
  np.testing.assert_allclose(run(*arrays), numpy_mixture(*arrays), atol=2e-5)


def test_gradients_are_those_of_all_experts_computed_and_masked():
  x, weights, chosen, gate, up, down = problem(2, 5)

  def dense(x, weights, gate, up, down):
    inner = jax.nn.silu(jnp.einsum('btd,edf->btef', x, gate)) * jnp.einsum('btd,edf->btef', x, up)
    each = jnp.einsum('btef,efd->bted', inner, down)
    combine = jnp.sum(jax.nn.one_hot(chosen, 4) * weights[..., None], axis=2)
    return jnp.sum(jnp.sin(jnp.einsum('bted,bte->btd', each, combine)))

  sparse = lambda x, w, *matrices: jnp.sum(jnp.sin(run(x, w, chosen, *matrices)))
  arguments = (x, weights, gate, up, down)
  expected = jax.grad(dense, argnums=range(5))(*arguments)
  found = jax.grad(sparse, argnums=range(5))(*arguments)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, atol=1e-4)


# Experts are cut along their width, spread one by one, and both. On the first mesh, rules would cut them
# over devices with other tokens; on the last, devices that have different experts have the same rows.
MESHES = [
  dict(
    fsdp=2, context=2, tensor=2, rules=dict(mlp='tensor,fsdp', experts='context', hidden='fsdp')
  ),
  dict(expert=4),
  dict(expert=2, context=2, tensor=2),
  dict(expert=2, data=2, rules={'batch': 'data'}),
]


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_a_mesh_changes_nothing(shape):
  arrays = problem(4, 4)
  loss = lambda *a: jnp.sum(jnp.sin(run(*a)))
  argnums = (0, 1, 3, 4, 5)
  expected = jax.value_and_grad(loss, argnums)(*arrays)
  mesh = sharding.make_mesh(**shape)
  with jax.set_mesh(mesh):
    found = jax.jit(jax.value_and_grad(loss, argnums))(*arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_an_expert_with_a_capacity_processes_its_first_tokens_alone():
  x, weights, chosen, *matrices = problem(2, 8)
  loads = np.bincount(np.asarray(chosen).reshape(-1), minlength=4)
  most = 8  # of each expert: 1.0 times the mean load of 32 choices of 4 experts
  assert loads.max() > most  # the crowded expert
  kept, seen = np.ones(chosen.shape, bool), np.zeros(4, int)
  for place in np.ndindex(chosen.shape):
    kept[place] = seen[chosen[place]] < most
    seen[chosen[place]] += 1
  expected = numpy_mixture(x, np.where(kept, weights, 0), chosen, *matrices)
  limited = lambda *arrays, **knobs: experts.mixture(*arrays, activation=jax.nn.silu, **knobs)
  found, dropped = limited(x, weights, chosen, *matrices, capacity=1.0)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  np.testing.assert_array_equal(dropped, np.sum(~kept, axis=-1))
  plenty, dropped = limited(x, weights, chosen, *matrices, capacity=4.0)
  assert not np.any(dropped)
  np.testing.assert_allclose(plenty, numpy_mixture(x, weights, chosen, *matrices), atol=2e-5)


def test_what_a_model_drops_is_counted_but_not_of_padding():
  moe = MOE | dict(num_layers=1)
  policy = tiny.policy(**moe, expert_capacity=0.01)  # each expert takes one token
  params, tokens = tiny.params(**moe), tiny.rows(0, 4, 10)
  segments = jnp.broadcast_to(jnp.arange(10) < 8, tokens.shape).astype(jnp.int32)
  share = jax.jit(policy.dropped, static_argnames=('prompt_length', 'rows_per_prompt'))
  share = functools.partial(share, params, tokens, segments)
  _, dropped = share()
  kept = MOE['experts_per_token'] * jnp.sum(1 - dropped[:, :8])
  assert kept == pytest.approx(4) and not jnp.any(dropped[:, 8:])
  # Rows that share a prompt: the last token of the prompt comes before each completion.
  _, dropped = share(prompt_length=6, rows_per_prompt=2)
  kept = MOE['experts_per_token'] * jnp.sum(1 - dropped[:, 1:3])
  assert dropped.shape == (4, 5) and kept == pytest.approx(4)


def test_all_experts_are_plain_softmax_weights_and_always_balanced():
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(7, 4)), jnp.float32)
  weights, chosen = experts.route(logits, jnp.zeros(4), k=4, normalize=False)
  np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(experts.excess(chosen, jnp.ones(7, bool), 4), 0)


def test_the_bias_changes_the_choice_and_not_the_weights():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(64, 4)), jnp.float32)
  route = lambda bias: experts.route(logits, bias, k=1, normalize=False)
  plain, first = route(jnp.zeros(4))
  np.testing.assert_array_equal(first[:, 0], jnp.argmax(logits, axis=-1))
  weights, chosen = route(jnp.array([9.0, 0, 0, 0]))
  assert bool(jnp.all(chosen == 0))
  np.testing.assert_array_equal(weights[:, 0], jax.nn.softmax(logits)[:, 0])
  same, again = route(jnp.full(4, 0.25))  # a constant steers nothing
  np.testing.assert_array_equal(again, first)
  np.testing.assert_array_equal(same, plain)


def test_padding_is_in_no_load():
  chosen = jnp.array([[0, 1], [0, 2], [3, 3]])
  found = experts.excess(chosen, jnp.array([True, True, False]), 4)
  np.testing.assert_array_equal(found, np.array([2, 1, 1, 0]) - 1.0)


def test_the_gradient_of_the_bias_is_the_excess_load_whatever_the_loss():
  excess = jnp.array([3.0, -1, -2])
  loss = lambda w, b: jnp.sum(experts.with_load_gradient(w, b, excess) ** 2)
  weights, bias = jnp.array([0.3, 0.7]), jnp.zeros(3)
  np.testing.assert_array_equal(jax.grad(loss, 1)(weights, bias), excess)
  np.testing.assert_allclose(jax.grad(loss, 0)(weights, bias), 2 * weights)


def test_sign_steps_balance_drawn_batches():
  """Scores with experts of different attraction: the worst overload falls to sampling noise."""
  random = np.random.default_rng(0)
  attraction = random.normal(scale=0.5, size=E)

  @jax.jit
  def step(bias, logits):
    _, chosen = experts.route(logits, bias, k=K, normalize=True)
    excess = experts.excess(chosen, jnp.ones(T, bool), E)
    return bias - 1e-3 * jnp.sign(excess), excess

  bias, history = jnp.zeros(E), []
  for _ in range(1500):
    bias, excess = step(bias, jnp.asarray(attraction + random.normal(size=(T, E)), jnp.float32))
    history.append(np.asarray(excess) / (K * T / E))
  assert np.max(history[0]) > 0.4
  assert np.mean([h.max() for h in history[-200:]]) < 0.2  # noise of one batch
  assert np.mean(history[-500:], axis=0).max() < 0.02  # and on average none


def test_linear_steps_descend_the_dual_of_the_assignment_problem():
  """With fixed scores the bias is the dual variable: sum_i topK(s_i + b) - L sum_k b_k falls."""
  random = np.random.default_rng(3)
  tokens, load = 200, 50
  attraction = np.array([[1.5, 0.5, 0, 0]])
  scores = jax.nn.softmax(jnp.asarray(attraction + random.normal(size=(tokens, 4)), jnp.float32))

  @jax.jit
  def step(bias):
    _, chosen = experts.route(jnp.log(scores), bias, k=1, normalize=False)
    excess = experts.excess(chosen, jnp.ones(tokens, bool), 4)
    dual = jnp.sum(jnp.max(scores + bias[None], axis=1)) - load * jnp.sum(bias)
    return bias - 2e-4 * excess, dual, jnp.max(excess)

  bias, duals, worst = jnp.zeros(4), [], []
  for _ in range(400):
    bias, dual, overload = step(bias)
    duals.append(float(dual))
    worst.append(float(overload))
  assert worst[0] > 50 and worst[-1] <= 2
  assert np.all(np.diff(duals) < 1e-2) and duals[-1] < duals[0] - 1


def test_a_sparse_decoder_decodes_as_it_trains():
  policy, params = tiny.policy(**MOE), tiny.params(**MOE)
  tokens = tiny.rows(4, 2, 6)
  ones = jnp.ones_like(tokens)
  expected = jax.jit(policy.hidden)(params, tokens, ones)
  positions = jnp.broadcast_to(jnp.arange(6)[None], tokens.shape)

  @jax.jit
  def decode(params):
    cut, cache = policy.unstack(params), policy.init_cache(2, 6)
    first, cache = policy.decode(cut, tokens[:, :4], positions[:, :4], ones[:, :4] > 0, cache, 0)
    rest, _ = policy.decode(cut, tokens[:, 4:], positions[:, 4:], ones[:, 4:] > 0, cache, 4)
    return jnp.concatenate([first, rest], axis=1)

  np.testing.assert_allclose(decode(params), expected, atol=1e-5)


def test_a_packed_sparse_row_is_its_documents():
  policy, params = tiny.policy(**MOE), tiny.params(**MOE)
  hidden = jax.jit(policy.hidden)
  tokens = tiny.rows(5, 1, 7)
  packed = hidden(params, tokens, jnp.array([[1, 1, 1, 1, 2, 2, 0]]))
  whole = lambda t: hidden(params, jnp.pad(t, ((0, 0), (0, 7 - t.shape[1]))), SEEN[t.shape[1]])
  np.testing.assert_allclose(packed[:, :4], whole(tokens[:, :4])[:, :4], atol=1e-5)
  np.testing.assert_allclose(packed[:, 4:6], whole(tokens[:, 4:6])[:, :2], atol=1e-5)


SEEN = [jnp.asarray(np.arange(7)[None] < n, jnp.int32) for n in range(8)]


def loads_gradient(policy, params, tokens, segment_ids):
  """The gradient of the router's biases under some loss, and the loads counted by hand."""
  learned = labelled(policy, params, 'balance')
  loss = lambda part: jnp.sum(policy.hidden(overlay(params, part), tokens, segment_ids) ** 2)
  return jax.jit(jax.grad(loss))(learned)['layers']['router_bias']


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_excess_loads_are_the_gradient_of_a_whole_model_and_add_over_batches(remat):
  policy, params = tiny.policy(**MOE, remat=remat), tiny.params(**MOE)
  tokens = tiny.rows(6, 4, 7)
  segment_ids = jnp.concatenate([SEEN[7], SEEN[5], SEEN[3], SEEN[6]])
  whole = loads_gradient(policy, params, tokens, segment_ids)
  assert whole.shape == (2, 4)
  np.testing.assert_allclose(jnp.sum(whole, axis=1), 0, atol=1e-5)
  assert float(jnp.sum(whole + 2 * 21 / 4)) == pytest.approx(
    2 * 2 * 21
  )  # 21 tokens, 2 experts each
  halves = [
    loads_gradient(policy, params, tokens[i : i + 2], segment_ids[i : i + 2]) for i in (0, 2)
  ]
  np.testing.assert_allclose(halves[0] + halves[1], whole, atol=1e-5)
