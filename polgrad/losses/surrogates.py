"""Policy-gradient losses of one token, to be minimised; r = exp(log_ratio).

Each keeps the value that its paper writes, so curves can be compared. On-policy (r = 1) those of
the trust-region family have the gradient of `reinforce`. Advantages are data. Log-ratios come
clamped from `ratios`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.path_consistency import path_consistency
from polgrad.losses.ratios import bounded, kept, soft_gate
from polgrad.registry import table
from polgrad.types import Array


def reinforce(logp: Array, advantages: Array) -> Array:
  """-A log pi: the score-function estimator (Williams 1992; standard).

  Args:
    logp: [..., T], nats.
    advantages: [..., T], in units of the reward.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([logp, advantages])
  return -advantages * logp


def importance_weighted(log_ratio: Array, advantages: Array) -> Array:
  """-A r: the unclipped importance-weighted objective, e.g. CPI in arXiv:1707.06347, section 3.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  return -advantages * jnp.exp(log_ratio)


def clipped(
  log_ratio: Array, advantages: Array, *, eps_low: float = 0.2, eps_high: float = 0.2
) -> Array:
  """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO (arXiv:1707.06347).

  DAPO's clip-higher is `eps_high=0.28` (arXiv:2503.14476). A token on the bound counts as kept and
  has its full gradient. Infinite bounds give `importance_weighted`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  return _pessimistic(jnp.exp(log_ratio), advantages, 1 - eps_low, 1 + eps_high)


def clipped_between(log_ratio: Array, advantages: Array, bounds: Array) -> Array:
  """-min(r A, clip(r, low, high) A) with bounds found for the batch: BAPO (arXiv:2510.18927).

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    bounds: f32[2], the least and the largest ratio, as `selections.balanced_bounds` gives them.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  chex.assert_shape(bounds, (2,))
  return _pessimistic(jnp.exp(log_ratio), advantages, bounds[0], bounds[1])


def clipped_away(
  log_ratio: Array, advantages: Array, *, eps_low: float = 0.2, eps_high: float = 0.2
) -> Array:
  """-A r of exactly the tokens that `clipped` drops, 0 elsewhere (arXiv:2511.20718).

  Its gradient is ST-PPO's clipping bias: that of `importance_weighted` is the sum of those of
  `clipped` and of this.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  ratio = jnp.exp(log_ratio)
  return jnp.where(kept(ratio, advantages, 1 - eps_low, 1 + eps_high), 0, -advantages * ratio)


def centered_clip(
  logp: Array,
  behavior_logp: Array,
  proximal_logp: Array,
  advantages: Array,
  *,
  eps: float = 0.2,
) -> Array:
  """-min(r A, clip(r, c - eps, c + eps) A), r = pi / behavior, c = proximal / behavior.

  Mix-PPG of ReMix (arXiv:2507.06892): rows of older policies keep their own importance ratio, and
  the trust region stands around the policy at the start of the phase. On-policy rows have c = 1,
  which is `clipped`.

  Args:
    logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    proximal_logp: [..., T], nats; detached here.
    advantages: [..., T].
    eps: distance of both bounds from the centre.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([logp, behavior_logp, proximal_logp, advantages])
  center = jnp.exp(bounded(jax.lax.stop_gradient(proximal_logp - behavior_logp)))
  ratio = jnp.exp(bounded(logp - behavior_logp))
  return _pessimistic(ratio, advantages, center - eps, center + eps)


def dual_clipped(
  log_ratio: Array,
  advantages: Array,
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
  cap: float = 3.0,
) -> Array:
  """`clipped`, and where A < 0 the loss is at most -cap A: dual-clip PPO (arXiv:1912.09729).

  Without the cap, a bad token that became much more likely has an unbounded loss.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.
    cap: the largest ratio itself (not a distance from 1), for A < 0.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 1, which would silence on-policy tokens.
  """
  chex.assert_equal_shape([log_ratio, advantages])
  if cap <= 1:
    raise ValueError(f'cap is an absolute ratio and must exceed 1, got {cap}')
  loss = clipped(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
  capped = (advantages < 0) & (jnp.exp(log_ratio) > cap)
  return jnp.where(capped, -cap * advantages, loss)


def truncated(
  logp: Array, log_ratio: Array, advantages: Array, *, cap: float = 5.0, floor: float = 0.0
) -> Array:
  """-sg(clip(r, floor, cap)) A log pi: CISPO (arXiv:2506.13585).

  No token is dropped: beyond the cap its weight is cut, not its gradient. `cap` is the largest
  ratio itself, by default that of ScaleRL (arXiv:2510.13786); some code bases take eps with
  cap = 1 + eps. An infinite cap has the gradient of `importance_weighted`; with a floor it is the
  truncation of arXiv:2509.24203.

  Args:
    logp: [..., T], nats; carries the gradient.
    log_ratio: [..., T], nats; detached here.
    advantages: [..., T].
    cap: the largest ratio.
    floor: the least ratio.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 0, which would silence every token, or a floor outside [0, cap].
  """
  chex.assert_equal_shape([logp, log_ratio, advantages])
  if cap <= 0:
    raise ValueError(f'cap is an absolute ratio and must be positive, got {cap}')
  if not 0 <= floor <= cap:
    raise ValueError(f'floor is an absolute ratio in [0, cap = {cap}], got {floor}')
  weight = jax.lax.stop_gradient(jnp.clip(jnp.exp(log_ratio), floor, cap))
  return -weight * advantages * logp


def soft_gated(
  log_ratio: Array,
  advantages: Array,
  *,
  tau_positive: float = 1.0,
  tau_negative: float = 1.05,
) -> Array:
  """-(4 / tau) sigmoid(tau (r - 1)) A: SAPO (arXiv:2511.20347).

  The gradient has the weight 4 p (1 - p) r A with p = sigmoid(tau (r - 1)): a trust region without
  an edge. It is A at r = 1, and tau -> 0 gives that of `importance_weighted`. Code that detaches the
  gate has another algorithm: `reinforce` with `weights.soft_gate`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    tau_positive: steepness where A > 0.
    tau_negative: steepness elsewhere.

  Returns:
    [..., T].

  Raises:
    ValueError: a steepness that is not positive.
  """
  chex.assert_equal_shape([log_ratio, advantages])
  return -soft_gate(jnp.exp(log_ratio), advantages, tau_positive, tau_negative) * advantages


def negative_aware(log_ratio: Array, advantages: Array, success_rate: Array) -> Array:
  """Likelihood of right rows under pi and of wrong ones under what is left: NFT (arXiv:2505.18116).

  With q the group's success rate, pi_old = q pi + (1 - q) pi_wrong defines the policy of wrong
  answers. Right rows (A = c) have the loss -c log r, wrong ones (A = -c)

      -c log max((1 - q r) / (1 - q), 1),

  the maximum in the value only, so gradients are bounded and never vanish: weights c and
  -c q r / max(1 - q r, 1 - q). On-policy, c = 1 - q gives the weights R - q.

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T], +c where the answer is right and -c where it is wrong.
    success_rate: f32[B], q of the row's group; clipped to [0.02, 0.98] as published.

  Returns:
    [B, T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  chex.assert_shape(success_rate, log_ratio.shape[:1])
  q = jnp.clip(success_rate, 0.02, 0.98)[:, None]
  wrong = (1 - q * jnp.exp(log_ratio)) / (1 - q)
  fixed = jax.lax.stop_gradient(wrong)
  wrong = jnp.maximum(fixed, 1) + (wrong - fixed)
  return -advantages * jnp.where(advantages < 0, -jnp.log(wrong), log_ratio)


def probability_shaped(logp: Array, advantages: Array, *, gamma: float = 0.1) -> Array:
  """-A p / (p + gamma), p = pi(token): the off-policy part of LUFFY (arXiv:2504.14945).

  The gradient has the weight gamma p / (p + gamma)^2, largest at p = gamma: tokens of a
  demonstration that the policy finds unlikely, not impossible, are learned most.

  Args:
    logp: [..., T], nats.
    advantages: [..., T].
    gamma: the probability that is weighted most.

  Returns:
    [..., T].

  Raises:
    ValueError: gamma <= 0.
  """
  chex.assert_equal_shape([logp, advantages])
  if gamma <= 0:
    raise ValueError(f'gamma must be positive, got {gamma}')
  return -advantages * jax.nn.sigmoid(logp - jnp.log(gamma))  # p / (p + gamma), without overflow


def _pessimistic(ratio: Array, advantages: Array, low: Array | float, high: Array | float) -> Array:
  """-min(r A, clip(r, low, high) A), written with the one bound that can bind."""
  bound = jnp.where(advantages >= 0, high, low).astype(ratio.dtype)
  return -advantages * jnp.where(kept(ratio, advantages, low, high), ratio, bound)


TABLE = table(
  'surrogates',
  reinforce,
  importance_weighted,
  clipped,
  clipped_between,
  clipped_away,
  dual_clipped,
  centered_clip,
  truncated,
  soft_gated,
  negative_aware,
  probability_shaped,
  path_consistency,
)
Part = Annotated[Callable, TABLE]
