"""Path consistency learning: one squared residual per token, for the sub-path that starts there.

`surrogates.TABLE` lists this function.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array


def path_consistency(
  logp: Array,
  reference_logp: Array,
  values: Array,
  rewards: Array,
  mask: Array,
  *,
  beta: float = 0.1,
  window: int = 1000,
) -> Array:
  """C_t^2 / 2 of the sub-path that starts at t: path consistency learning (arXiv:1702.08892).

      C_t = -V_t + V_{t+d} + R 1[the path ends] - beta sum_{t <= k < t+d} (log pi_k - log ref_k)

  over the next d = min(window, tokens left) valid tokens, undiscounted, with V = 0 after the end
  and the reward on the last token. At the optimum of E[R] - beta KL(pi, ref) every C is 0, whichever
  policy sampled. The gradient flows to the policy and to the values.

  Args:
    logp: [B, T], nats.
    reference_logp: [B, T], nats.
    values: [B, T], V_t, the value of the state before token t, in units of the reward.
    rewards: f32[B].
    mask: bool[B, T]; masked tokens between valid ones are skipped.
    beta: coefficient of the KL, in units of the reward per nat.
    window: largest number of valid tokens in a sub-path.

  Returns:
    [B, T]; 0 where `mask` is False.

  Raises:
    ValueError: window < 1.
  """
  chex.assert_equal_shape([logp, reference_logp, values, mask])
  chex.assert_shape(rewards, mask.shape[:1])
  if window < 1:
    raise ValueError(f'window must be at least 1, got {window}')
  end = following_token(mask, window)  # where the sub-path of each token ends
  at = lambda x: jnp.take_along_axis(x, end, axis=1)
  values = jnp.pad(jnp.where(mask, values, 0), ((0, 0), (0, 1)))
  # The cost of a sub-path is a difference of two cumulative sums.
  cost = beta * jnp.where(mask, logp - reference_logp, 0)
  before = jnp.pad(jnp.cumsum(cost, axis=1), ((0, 0), (1, 0)))
  reward = jnp.where(end == mask.shape[1], rewards[:, None], 0)
  gap = at(values) - values[:, :-1] + reward - (at(before) - before[:, :-1])
  return jnp.where(mask, gap**2 / 2, 0)


def following_token(mask: Array, steps: int) -> Array:
  """Column of the valid token `steps` valid tokens after each token; T if there is none: i32[B, T]."""
  length = mask.shape[1]
  place = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
  places = jnp.sort(jnp.where(mask, place, length), axis=1)  # columns of valid tokens, then T
  places = jnp.pad(places, ((0, 0), (0, 1)), constant_values=length)
  count = jnp.cumsum(mask, axis=1) - 1 + steps
  return jnp.take_along_axis(places, jnp.minimum(count, length), axis=1)
