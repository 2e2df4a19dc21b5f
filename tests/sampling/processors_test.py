"""What the processors keep, and what the roles make of logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.registry import bind, inputs, part
from polgrad.sampling import behavior_policies, processors

PROBS = np.array([0.4, 0.1, 0.3, 0.2])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))[None]


def kept(logits):
  return np.flatnonzero(np.isfinite(logits[0])).tolist()


@pytest.mark.parametrize(
  'k, expected', [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_k_most_likely(k, expected):
  assert kept(processors.top_k(LOGITS, k=k)) == expected


@pytest.mark.parametrize(
  'p, expected', [(1e-6, [0]), (0.39, [0]), (0.41, [0, 2]), (0.69, [0, 2]), (0.71, [0, 2, 3])]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(p, expected):
  assert kept(processors.top_p(LOGITS, p=p)) == expected


def test_ties_at_the_edge_stay_together():
  even = jnp.zeros((1, 4))
  assert kept(processors.top_k(even, k=2)) == [0, 1, 2, 3]
  assert kept(processors.top_p(even, p=0.3)) == [0, 1, 2, 3]


def test_what_stays_keeps_its_proportions():
  cut = processors.top_p(processors.temperature(LOGITS, value=0.5), p=0.8)
  np.testing.assert_allclose(jax.nn.softmax(cut)[0], [0.16 / 0.25, 0, 0.09 / 0.25, 0], atol=1e-6)


def test_processors_leave_one_certain_token_alone():
  certain = behavior_policies.greedy(LOGITS)
  assert kept(certain) == [0]
  for process in (processors.temperature, processors.top_k, processors.top_p):
    np.testing.assert_array_equal(process(certain), certain)


def test_greedy_takes_the_first_of_equals():
  assert kept(behavior_policies.greedy(jnp.array([[1.0, 2.0, 2.0]]))) == [1]


def test_geometric_mixture_is_the_normalised_product():
  other = np.array([0.1, 0.6, 0.2, 0.1])
  product = PROBS**0.7 * other**0.3
  mixed = behavior_policies.geometric_mixture(
    LOGITS + 2.0, jnp.log(other)[None] - 1.0, reference_weight=0.3
  )
  np.testing.assert_allclose(jnp.exp(mixed)[0], product / product.sum(), atol=1e-6)
  ends = [
    behavior_policies.geometric_mixture(LOGITS, jnp.log(other)[None], reference_weight=w)
    for w in (0.0, 1.0)
  ]
  np.testing.assert_allclose(jnp.exp(jnp.concatenate(ends)), [PROBS, other], atol=1e-6)


def test_roles_are_parts_that_name_their_parameter_sets():
  role = bind(
    part(behavior_policies.geometric_mixture, reference_weight=0.25), behavior_policies.TABLE
  )
  assert inputs(role) == ('policy', 'reference')
  assert isinstance(role, functools.partial) and role.keywords == {'reference_weight': 0.25}
  assert behavior_policies.models_read(behavior_policies.fading_contrast) == (
    *('policy', 'expert', 'antiexpert'),
  )
  assert inputs(behavior_policies.current) == inputs(behavior_policies.greedy) == ('policy',)


def test_the_contrast_of_experts_is_a_product_of_powers_over_what_the_reference_keeps():
  base, expert, anti = np.random.default_rng(0).normal(size=(3, 5, 9))
  probs = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  with jax.enable_x64(True):
    fn = lambda *z, **knobs: np.exp(
      behavior_policies.expert_contrast(*map(jnp.asarray, z), **knobs)
    )
    expected = probs(base) * (probs(expert) / probs(anti)) ** 0.7
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(fn(base, expert, anti, strength=0.7), expected, rtol=1e-12)
    np.testing.assert_allclose(fn(base, expert, anti, strength=0.0), probs(base), rtol=1e-12)
    mixed = probs(0.3 * base + 0.7 * expert)
    np.testing.assert_allclose(fn(base, expert, base, strength=0.7), mixed, rtol=1e-12)
    for batches, alpha in ((0, 0.7), (1999, 0.7), (2000, 0.7 * 2**-0.25), (31999, 0.35)):
      faded = behavior_policies.fading_contrast(
        *map(jnp.asarray, (base, expert, anti, float(batches))), strength=0.7, top_p=1.0
      )
      expected_now = probs(base) * (probs(expert) / probs(anti)) ** alpha
      expected_now /= expected_now.sum(-1, keepdims=True)
      np.testing.assert_allclose(np.exp(faded), expected_now, rtol=1e-12)
    found = fn(base, expert, anti, strength=0.7, top_p=0.6)
    inside = np.isfinite(np.asarray(processors.top_p(jnp.asarray(base), p=0.6)))
    kept = np.where(inside, expected, 0)
    np.testing.assert_allclose(found, kept / kept.sum(-1, keepdims=True), rtol=1e-12)
