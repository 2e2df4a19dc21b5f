"""Keep-masks: weights of the token loss that are 1 where a token is in a trust region, else 0.

`weights.TABLE` includes these functions, so they fill one of the `weights` of
`objectives.PolicyGradient`. r = exp(log_ratio) compares the live policy with the proximal one. Bounds
are ratios themselves, not distances from 1. No gradient flows through a mask.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._common import geometric_ratio, kept, row_mean, within
from polgrad.types import Array


def one_sided(log_ratio: Array, advantages: Array, *, low: float = 0.8, high: float = 1.2) -> Array:
  """1[(A >= 0 and r <= high) or (A <= 0 and r >= low)]: REC-OneSide (arXiv:2509.24203).

  With `surrogates.reinforce` this is REINFORCE with clipping but without importance sampling. With
  `surrogates.truncated` and an infinite cap the gradient is that of `surrogates.clipped`. The wide
  bounds of the paper are low=0.4, high=3.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    low: smallest ratio that is kept where A < 0.
    high: largest ratio that is kept where A > 0.

  Returns:
    [..., T], 0 or 1.
  """
  chex.assert_equal_shape([log_ratio, advantages])
  return kept(jnp.exp(log_ratio), advantages, low, high).astype(log_ratio.dtype)


def two_sided(log_ratio: Array, *, low: float = 0.8, high: float = 1.2) -> Array:
  """1[low <= r <= high]: REC-TwoSide (arXiv:2509.24203); low = 1 / high is sPPO (arXiv:2108.05828).

  Args:
    log_ratio: [..., T], nats.
    low: smallest ratio that is kept.
    high: largest ratio that is kept.

  Returns:
    [..., T], 0 or 1.
  """
  return within(jnp.exp(log_ratio), low, high).astype(log_ratio.dtype)


def ring(
  log_ratio: Array,
  advantages: Array,
  *,
  low: float = 0.8,
  high: float = 1.2,
  outer_low: float = 0.4,
  outer_high: float = 3.0,
) -> Array:
  """1[low <= r <= high, or (A >= 0 and r <= outer_low), or (A <= 0 and r >= outer_high)]: REC-Ring
  (arXiv:2509.24203).

  Besides the tokens of `two_sided`, tokens that moved far against their advantage are kept, so the
  loss can pull them back.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    low: smallest ratio of the inner band.
    high: largest ratio of the inner band.
    outer_low: tokens with A >= 0 are kept again at ratios up to this.
    outer_high: tokens with A <= 0 are kept again at ratios from this on.

  Returns:
    [..., T], 0 or 1.
  """
  chex.assert_equal_shape([log_ratio, advantages])
  ratio = jnp.exp(log_ratio)
  good = (advantages >= 0) & (ratio <= outer_low)
  bad = (advantages <= 0) & (ratio >= outer_high)
  return (within(ratio, low, high) | good | bad).astype(log_ratio.dtype)


def probability_one_sided(
  logp: Array, behavior_logp: Array, advantages: Array, *, low: float = 0.2, high: float = 0.2
) -> Array:
  """1[A >= 0 and pi - mu <= high, or A <= 0 and pi - mu >= -low]: DPPO-TV (arXiv:2602.04879).

  mu is the sampling policy. The trust region bounds differences of probabilities, so the probability of
  a rare token may change by a large factor, that of a likely token only by a small one.

  Args:
    logp: [..., T], nats; detached here.
    behavior_logp: [..., T], nats.
    advantages: [..., T].
    low: largest decrease of a probability that is kept where A < 0.
    high: largest increase of a probability that is kept where A > 0.

  Returns:
    [..., T], 0 or 1.
  """
  chex.assert_equal_shape([logp, behavior_logp, advantages])
  gap = jnp.exp(logp) - jnp.exp(behavior_logp)
  return kept(gap, advantages, -low, high).astype(logp.dtype)


def near_or_positive(
  logp: Array, proximal_logp: Array, advantages: Array, mask: Array, *, limit: float = 0.5
) -> Array:
  """1[A >= 0 or mean_t(log pi_old - log pi) <= limit]: DeepSeek-V3.2 (arXiv:2512.02556).

  Off-policy sequence masking: a row that has become much less likely since the start of the phase is
  kept only where its advantage is not negative.

  Args:
    logp: [..., T], nats; detached here.
    proximal_logp: [..., T], nats.
    advantages: [..., T].
    mask: bool[..., T].
    limit: largest mean decrease of the log-probability that is kept where A < 0, nats per token.

  Returns:
    [..., T], 0 or 1.
  """
  chex.assert_equal_shape([logp, proximal_logp, advantages, mask])
  near = row_mean(jax.lax.stop_gradient(proximal_logp - logp), mask) <= limit
  return ((jnp.where(mask, advantages, 0) >= 0) | near).astype(logp.dtype)


def near_behavior_or_positive(
  logp: Array, behavior_logp: Array, advantages: Array, mask: Array, *, limit: float = 0.5
) -> Array:
  """`near_or_positive` measured from the policy that sampled: DeepSeek-V3.2 (arXiv:2512.02556).

  The distance then also contains what the sampler's kernels and precision change, and how old its
  parameters were.

  Args:
    logp: [..., T], nats; detached here.
    behavior_logp: [..., T], nats.
    advantages: [..., T].
    mask: bool[..., T].
    limit: largest mean decrease of the log-probability that is kept where A < 0, nats per token.

  Returns:
    [..., T], 0 or 1.
  """
  return near_or_positive(logp, behavior_logp, advantages, mask, limit=limit)


def geometric_band(
  proximal_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  low: float = 0.999,
  high: float = 1.001,
) -> Array:
  """1 in rows with low <= (prod_t rho_t)^(1/L) <= high, else 0 (standard).

  rho = pi_proximal / pi_behavior, and L is the number of tokens of the row. Because of the exponent
  1/L, the same bounds suit short and long rows. The mask only drops rows; combine it with a token
  weight (`weights.truncated_importance`) to correct the rows that are kept.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    low: smallest geometric mean that is kept.
    high: largest geometric mean that is kept.

  Returns:
    [..., T], 0 or 1, the same in all tokens of a row.
  """
  keep = within(geometric_ratio(proximal_logp, behavior_logp, mask), low, high)
  return jnp.broadcast_to(keep.astype(proximal_logp.dtype), mask.shape)


def selected(selected: Array) -> Array:
  """1 where the selection named `selected` is True, else 0 (standard).

  Args:
    selected: bool[...].

  Returns:
    f32[...], 0 or 1.
  """
  return selected.astype(float)


def unselected(selected: Array) -> Array:
  """0 where the selection named `selected` is True, else 1: Clip-Cov drops these tokens
  (arXiv:2505.22617).

  Args:
    selected: bool[...].

  Returns:
    f32[...], 0 or 1.
  """
  return 1 - selected.astype(float)
