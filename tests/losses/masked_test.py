"""What a masked token holds reaches no gradient, whichever loss reads it, without an objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import registry
from polgrad.losses import aggregation, divergences, penalties, ratios, surrogates

MASK = jnp.array([[True, True, False], [False, True, True], [False, False, False]])
B, T, V = 3, 3, 4
LOSSES = [
  fn
  for table in (surrogates.TABLE, penalties.TABLE, ratios.TABLE, divergences.TABLE)
  for fn in table.values()
]
CONSTANTS = dict(
  mask=MASK,
  turn_ids=jnp.where(MASK, 0, -1),
  selected=jnp.array([[True, False, True], [False, True, False], [True, True, True]]),
  bounds=jnp.array([0.8, 1.2]),
  mean_entropy=jnp.array(0.7),
  success_rate=jnp.array([0.3, 0.6, 0.5]),
  rewards=jnp.array([1.0, -0.5, 0.2]),
  local_weight=jnp.array([0.3, 0.9, 0.5]),
  replay_weight=jnp.array([0.4, 1.0, 0.7]),
  token_staleness=jnp.where(MASK, 1.0, 0.0),
  excess_drift=jnp.array(0.5),
)


def name_of(fn):
  return f'{fn.__module__.split(".")[-1]}.{fn.__name__}'


@functools.cache
def gradient_of(fn):
  """A compiled function: the loss of a batch and its gradient by all arrays with one entry a token."""

  def loss(tokens):
    value = registry.call(fn, CONSTANTS | tokens)
    return aggregation.token_mean(value, MASK).value()

  return jax.jit(jax.value_and_grad(loss))


def arrays_of(fn):
  rng = np.random.default_rng(0)
  names = [name for name in registry.inputs(fn) if name not in CONSTANTS]
  shape = lambda name: (B, T, V) if name.endswith('logits') else (B, T)
  return {name: jnp.asarray(rng.normal(size=shape(name)), jnp.float32) for name in names}


@pytest.mark.parametrize('fn', LOSSES, ids=name_of)
def test_nan_and_inf_in_masked_tokens_reach_neither_value_nor_gradient(fn):
  clean = arrays_of(fn)
  value, gradient = gradient_of(fn)(clean)
  assert np.isfinite(value)
  spoiled = [*({name} for name in clean), set(clean)]
  for junk in (np.nan, np.inf, -np.inf):
    for names in spoiled:
      where = {name: MASK.reshape(B, T, *[1] * (x.ndim - 2)) for name, x in clean.items()}
      dirty = {n: jnp.where(where[n], x, junk) if n in names else x for n, x in clean.items()}
      got, slope = gradient_of(fn)(dirty)
      np.testing.assert_array_equal(got, value)
      for name in clean:
        message = f'{junk} in {names}, gradient of {name}'
        np.testing.assert_array_equal(slope[name], gradient[name], err_msg=message)
        assert not np.any(slope[name][~MASK]), message


UNSEEN = {
  # Not minimised; the surrogate beside it reads the same ratio.
  (surrogates.clipped_away, 'log_ratio'),
  # One of two constants, without gradient.
  (penalties.entropy_band_published, 'entropy'),
  # Only their sign is read; the surrogate reads them too.
  (ratios.sequence_geometric_clipped, 'advantages'),
}


@pytest.mark.parametrize('fn', LOSSES, ids=name_of)
def test_nan_in_a_token_that_counts_is_not_hidden(fn):
  clean = arrays_of(fn)
  for name, x in clean.items():
    if (fn, name) in UNSEEN:
      continue
    value, _ = gradient_of(fn)(clean | {name: x.at[0, 0].set(jnp.nan)})
    assert np.isnan(value), name
