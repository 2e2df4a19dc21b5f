"""Policy-gradient losses of one token, to be minimised; r = exp(log_ratio).

A function of `TABLE` fills the slot `surrogate` (or is one of the `probes`) of
`objectives.PolicyGradient`. Each returns the value that its paper writes, so loss curves can be
compared with published ones. On-policy (r = 1) all of them have the gradient of `reinforce`, except
`clipped_away`, `negative_aware`, `probability_shaped`, `probability_power` and `path_consistency`.

`log_ratio` comes from `ratios`, which clamps it to +-20 nats. `advantages` are constants: the caller
does not differentiate them. `sg` means stop_gradient.

A token whose input is NaN or infinite has gradient exactly 0, so that a masked token cannot spoil the
gradient of a mean over the others. Its loss is not repaired: if the token counts, the mean is NaN.

The examples need `import jax.numpy as jnp, numpy as np` and `from polgrad.losses import surrogates`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._common import (
  LIMIT,
  bounded,
  finite_gradient,
  kept,
  soft_gate,
  token_ratio,
  truncate,
)
from polgrad.losses.path_consistency import path_consistency
from polgrad.registry import Positive, table
from polgrad.types import Array


def reinforce(logp: Array, advantages: Array) -> Array:
  """-A log pi: the score-function estimator (Williams 1992; standard).

  Args:
    logp: [..., T], nats.
    advantages: [..., T], in units of the reward.

  Returns:
    [..., T].

  >>> loss = surrogates.reinforce(jnp.array([-0.5, -2.0]), jnp.array([1.0, -1.0]))
  >>> print(np.asarray(loss).round(2))
  [ 0.5 -2. ]
  """
  logp, advantages = finite_gradient(logp, advantages)
  return -advantages * logp


def importance_weighted(log_ratio: Array, advantages: Array) -> Array:
  """-A r: the unclipped importance-weighted objective, e.g. CPI in arXiv:1707.06347, section 3.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].

  Returns:
    [..., T].

  >>> log_ratio = jnp.log(jnp.array([0.5, 1.5]))
  >>> loss = surrogates.importance_weighted(log_ratio, jnp.array([1.0, -1.0]))
  >>> print(np.asarray(loss).round(2))
  [-0.5  1.5]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  return -advantages * jnp.exp(log_ratio)


def clipped(
  log_ratio: Array, advantages: Array, *, eps_low: float = 0.2, eps_high: float = 0.2
) -> Array:
  """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO (arXiv:1707.06347).

  DAPO's clip-higher is `eps_high=0.28` (arXiv:2503.14476). A token exactly on a bound is not clipped
  and has its full gradient. Infinite bounds give `importance_weighted`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.

  Returns:
    [..., T].

  >>> log_ratio = jnp.log(jnp.array([0.5, 1.5, 0.5, 1.5]))
  >>> advantages = jnp.array([1.0, 1.0, -1.0, -1.0])
  >>> loss = surrogates.clipped(log_ratio, advantages)
  >>> print(np.asarray(loss).round(2))
  [-0.5 -1.2  0.8  1.5]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  return _pessimistic(jnp.exp(log_ratio), advantages, 1 - eps_low, 1 + eps_high)


def clipped_between(
  log_ratio: Array, advantages: Array, bounds: Array, *, cap: float = float('inf')
) -> Array:
  """-min(r A, clip(r, low, high) A) with bounds found for the batch: BAPO (arXiv:2510.18927).

  Where A < 0 the loss is at most -cap A, as in `dual_clipped`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    bounds: f32[2], the ratios (low, high), for example from `selections.balanced_bounds`.
    cap: the largest ratio itself for A < 0, beyond which the gradient is 0; the default has no cap.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 1, so bad tokens would lose their gradient at or near r = 1.

  >>> log_ratio = jnp.log(jnp.array([0.5, 1.5]))
  >>> bounds = jnp.array([0.6, 1.3])
  >>> loss = surrogates.clipped_between(log_ratio, jnp.array([-1.0, 1.0]), bounds)
  >>> print(np.asarray(loss).round(2))
  [ 0.6 -1.3]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  chex.assert_shape(bounds, (2,))
  loss = _pessimistic(jnp.exp(log_ratio), advantages, bounds[0], bounds[1])
  return _capped(loss, log_ratio, advantages, cap)


def clipped_away(
  log_ratio: Array, advantages: Array, *, eps_low: float = 0.2, eps_high: float = 0.2
) -> Array:
  """-A r of exactly the tokens that `clipped` clips, 0 elsewhere (arXiv:2511.20718).

  Its gradient is the clipping bias of ST-PPO: the gradient of `importance_weighted` is the gradient of
  `clipped` plus the gradient of this function.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.

  Returns:
    [..., T].

  >>> log_ratio = jnp.log(jnp.array([1.1, 1.5]))
  >>> loss = surrogates.clipped_away(log_ratio, jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(2))
  [ 0.  -1.5]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
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

  Mix-PPG of ReMix (arXiv:2507.06892). Rows sampled by older policies keep their own importance ratio,
  and the trust region is centred on the policy at the start of the phase. Rows sampled by that policy
  have c = 1, which gives `clipped`.

  Args:
    logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    proximal_logp: [..., T], nats; detached here.
    advantages: [..., T].
    eps: distance of both bounds from the centre c.

  Returns:
    [..., T].

  >>> logp, behavior_logp, proximal_logp = jnp.log(jnp.array([[0.5], [0.2], [0.3]]))
  >>> loss = surrogates.centered_clip(logp, behavior_logp, proximal_logp, jnp.array([1.0]))
  >>> print(np.asarray(loss).round(2))  # r = 2.5 is clipped at c + eps = 1.5 + 0.2
  [-1.7]
  """
  logp, behavior_logp, proximal_logp, advantages = finite_gradient(
    logp, behavior_logp, proximal_logp, advantages
  )
  center = token_ratio(proximal_logp, behavior_logp)
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

  Without the cap, the loss of a bad token grows without bound as the token becomes more likely. Beyond
  the cap the gradient is 0.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.
    cap: the largest ratio itself (not a distance from 1), for A < 0.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 1, so bad tokens would lose their gradient at or near r = 1.

  >>> log_ratio = jnp.log(jnp.array([2.0, 9.0]))
  >>> loss = surrogates.dual_clipped(log_ratio, jnp.array([-1.0, -1.0]))
  >>> print(np.asarray(loss).round(2))
  [2. 3.]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  loss = clipped(log_ratio, advantages, eps_low=eps_low, eps_high=eps_high)
  return _capped(loss, log_ratio, advantages, cap)


def two_level_clipped(
  log_ratio: Array,
  advantages: Array,
  global_advantages: Array,
  local_weight: Array,
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
  cap: float = 3.0,
) -> Array:
  """w L(A) + (1 - w) L(A'), L the loss `dual_clipped`: COPO (arXiv:2508.04138).

  A compares the rows of a group, A' the groups of the batch. Both losses are clipped by the sign of
  their own advantage, so this is not the loss of the advantage w A + (1 - w) A' where signs differ.

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T], A.
    global_advantages: [B, T], A'.
    local_weight: [B], w in [0, 1].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.
    cap: the largest ratio itself (not a distance from 1), for negative advantages.

  Returns:
    [B, T].

  Raises:
    ValueError: cap <= 1.

  >>> log_ratio, one = jnp.log(jnp.array([[1.5]])), jnp.ones((1, 1))
  >>> loss = surrogates.two_level_clipped(log_ratio, one, -one, jnp.array([0.5]))
  >>> print(np.asarray(loss).round(2))
  [[0.15]]
  """
  chex.assert_rank([log_ratio, local_weight], [2, 1])
  chex.assert_equal_shape_prefix([log_ratio, local_weight], 1)
  knobs = dict(eps_low=eps_low, eps_high=eps_high, cap=cap)
  local = dual_clipped(log_ratio, advantages, **knobs)
  across = dual_clipped(log_ratio, global_advantages, **knobs)
  weight = local_weight[:, None]
  return weight * local + (1 - weight) * across


def drift(log_ratio: Array, excess_drift: Array) -> Array:
  """-c log_ratio, whose mean is c KL(old policy, policy) on samples of the old one: the trust region of
  DRPO (arXiv:2510.04474), with c from `selections.excess_drift`.

  Args:
    log_ratio: [..., T], log pi - log pi_old, nats; carries gradient.
    excess_drift: [], c >= 0, constant.

  Returns:
    [..., T].

  >>> print(np.asarray(surrogates.drift(jnp.array([0.1, -0.2]), jnp.array(2.0))).round(2))
  [-0.2  0.4]
  """
  chex.assert_rank(excess_drift, 0)
  (log_ratio,) = finite_gradient(log_ratio)
  return -jax.lax.stop_gradient(excess_drift) * log_ratio


def entropy_adaptive(
  log_ratio: Array,
  advantages: Array,
  signed_entropy: Array,
  *,
  eps: float = 0.2,
  widening: float = 1.0,
  emphasis: float = 1.0,
  cap: float = 10.0,
) -> Array:
  """Dual-clip PPO whose bounds and advantages depend on the entropy of the token (HAPO,
  arXiv:2509.16591).

      low  = 1 - eps (1 - widening h) where h <= 0, else 1 - eps
      high = 1 + eps (1 + widening h) where h > 0, else 1 + eps
      A'   = (1 + emphasis h) A for tokens with h > 0 and r outside ((1 + low) / 2, (1 + high) / 2), and
             for tokens with h <= 0 and r inside; A elsewhere

  h is the signed entropy, r the ratio. The loss is -min(r A', clip(r, low, high) A'), at most -cap A'
  where A' < 0. Tokens of low entropy may become much less likely and those of high entropy much more
  likely; tokens of low entropy count less as long as the policy has not moved, and those of high entropy
  more once it has.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    signed_entropy: [..., T], h in [-1, 1], from `selections.signed_entropy`; detached here.
    eps: distance of the bounds from 1 at h = 0.
    widening: by which fraction a bound is wider at |h| = 1; alpha in the paper.
    emphasis: beta in the paper; at most 1, or A' could have another sign than A.
    cap: the largest ratio itself for A < 0, beyond which the gradient is 0.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 1, or emphasis outside [0, 1].

  >>> log_ratio, h = jnp.log(jnp.array([0.7, 1.5])), jnp.array([-1.0, 1.0])
  >>> loss = surrogates.entropy_adaptive(log_ratio, jnp.array([-1.0, 1.0]), h)
  >>> print(np.asarray(loss).round(2))
  [ 0.7 -2.8]
  """
  h = jax.lax.stop_gradient(signed_entropy)
  log_ratio, advantages, h = finite_gradient(log_ratio, advantages, h)
  if not 0 <= emphasis <= 1:
    raise ValueError(f'emphasis must lie in [0, 1], got {emphasis}')
  ratio = jnp.exp(bounded(log_ratio))
  # Distances of the bounds from 1.
  down = eps * (1 - widening * jnp.minimum(h, 0))
  up = eps * (1 + widening * jnp.maximum(h, 0))
  moved = jax.lax.stop_gradient((ratio <= 1 - down / 2) | (ratio >= 1 + up / 2))
  advantages = jnp.where(moved == (h > 0), (1 + emphasis * h) * advantages, advantages)
  loss = _pessimistic(ratio, advantages, 1 - down, 1 + up)
  return _capped(loss, log_ratio, advantages, cap)


def flipped(
  log_ratio: Array,
  advantages: Array,
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
  cap: float = 3.0,
) -> Array:
  """-w A with w = 1 / r where A >= 0 and w = r where A < 0: ASPO (arXiv:2510.06062).

  Good tokens have the inverse ratio, so those that the policy has come to neglect are learned most;
  the gradient weight of log pi is w A (+A / r, not the -A / r of a differentiated 1 / r). Tokens that
  `clipped` drops are dropped here too, with the value of the bound. Where w > cap, value and weight are
  those of w = cap, so the gradient is bounded but not lost.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound of r from 1, for A < 0.
    eps_high: distance of the upper bound of r from 1, for A >= 0.
    cap: the largest w itself (not a distance from 1).

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 1, so tokens would have another weight than A at or near r = 1.

  >>> log_ratio = jnp.log(jnp.array([0.5, 0.1, 1.5, 0.5, 1.5]))
  >>> loss = surrogates.flipped(log_ratio, jnp.array([1.0, 1.0, 1.0, -1.0, -1.0]))
  >>> print(np.asarray(loss).round(2))
  [-2.   -3.   -0.83  0.8   1.5 ]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  if cap <= 1:
    raise ValueError(f'cap is an absolute weight and must exceed 1, got {cap}')
  low, high = 1 - eps_low, 1 + eps_high
  fixed = jax.lax.stop_gradient(log_ratio)
  good, bad = jnp.clip(jnp.exp(-fixed), 1 / high, cap), jnp.clip(jnp.exp(fixed), low, cap)
  weight = jnp.where(advantages >= 0, good, bad)
  # 1 in value, with the gradient of log pi where the trust region keeps the token.
  live = jnp.where(kept(jnp.exp(fixed), advantages, low, high), jnp.exp(log_ratio - fixed), 1)
  return -advantages * weight * live


def gradient_preserving(
  log_ratio: Array,
  advantages: Array,
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
  beta_low: float = 0.75,
  beta_high: float = 1.0,
) -> Array:
  """`clipped`, but a clipped token has the weight beta times its bound: CE-GPPO (arXiv:2509.20712).

  The loss is -w A r / sg(r) with w = beta_high (1 + eps_high) where A > 0 and r is above the bounds,
  w = beta_low (1 - eps_low) where A < 0 and r is below them, and w = r elsewhere. The gradient weight
  of log pi is w A. With both betas 0 the gradient is that of `clipped`; its weight does not jump at
  a bound whose beta is 1.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    eps_low: distance of the lower bound from 1.
    eps_high: distance of the upper bound from 1.
    beta_low: scale of clipped tokens with A < 0 (beta_1 in the paper).
    beta_high: scale of clipped tokens with A > 0 (beta_2 in the paper).

  Returns:
    [..., T].

  Raises:
    ValueError: beta_low < 0 or beta_high < 0, so clipped tokens would be pushed against their advantage.

  >>> log_ratio = jnp.log(jnp.array([0.5, 1.5, 0.5, 1.5]))
  >>> advantages = jnp.array([1.0, 1.0, -1.0, -1.0])
  >>> loss = surrogates.gradient_preserving(log_ratio, advantages)
  >>> print(np.asarray(loss).round(2))
  [-0.5 -1.2  0.6  1.5]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  if beta_low < 0 or beta_high < 0:
    raise ValueError(f'beta must not be negative, got {beta_low} and {beta_high}')
  low, high = 1 - eps_low, 1 + eps_high
  fixed = jax.lax.stop_gradient(log_ratio)
  ratio = jnp.exp(fixed)
  bound = jnp.where(advantages >= 0, beta_high * high, beta_low * low).astype(ratio.dtype)
  weight = jnp.where(kept(ratio, advantages, low, high), ratio, bound)
  # r / sg(r) is 1 in value, with the gradient of log pi.
  return -advantages * weight * jnp.exp(log_ratio - fixed)


def truncated(
  logp: Array, log_ratio: Array, advantages: Array, *, cap: float = 5.0, floor: float = 0.0
) -> Array:
  """-sg(clip(r, floor, cap)) A log pi: CISPO (arXiv:2506.13585).

  No token is dropped: beyond the cap a token keeps a gradient, with weight `cap` instead of r. `cap`
  is the largest ratio itself; the default is that of ScaleRL (arXiv:2510.13786). Some code bases take
  eps, with cap = 1 + eps. An infinite cap has the gradient of `importance_weighted`; with a floor this
  is the truncation of arXiv:2509.24203.

  Args:
    logp: [..., T], nats; carries the gradient.
    log_ratio: [..., T], nats; detached here.
    advantages: [..., T].
    cap: largest weight.
    floor: smallest weight.

  Returns:
    [..., T].

  Raises:
    ValueError: cap <= 0, so no token would have a positive weight; or a floor outside [0, cap].

  >>> logp, log_ratio = jnp.array([-1.0, -1.0]), jnp.log(jnp.array([0.5, 9.0]))
  >>> loss = surrogates.truncated(logp, log_ratio, jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(2))
  [0.5 5. ]
  """
  logp, log_ratio, advantages = finite_gradient(logp, log_ratio, advantages)
  if cap <= 0:
    raise ValueError(f'cap is an absolute ratio and must be positive, got {cap}')
  weight = jax.lax.stop_gradient(truncate(jnp.exp(log_ratio), floor, cap))
  return -weight * advantages * logp


def soft_gated(
  log_ratio: Array,
  advantages: Array,
  *,
  tau_positive: float = 1.0,
  tau_negative: float = 1.05,
) -> Array:
  """-(4 / tau) sigmoid(tau (r - 1)) A: SAPO (arXiv:2511.20347).

  The gradient weight of log pi is 4 p (1 - p) r A with p = sigmoid(tau (r - 1)): a trust region that
  fades out smoothly. The weight is A at r = 1; as tau -> 0 it tends to r A, that of
  `importance_weighted`. Code that detaches the gate is a different algorithm: `reinforce` with
  `weights.soft_gate`.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T].
    tau_positive: steepness of the gate where A > 0.
    tau_negative: steepness of the gate where A <= 0.

  Returns:
    [..., T].

  Raises:
    ValueError: tau_positive <= 0 or tau_negative <= 0.

  >>> log_ratio = jnp.log(jnp.array([1.0, 3.0]))
  >>> loss = surrogates.soft_gated(log_ratio, jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(2))
  [-2.   -3.52]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  return -soft_gate(jnp.exp(log_ratio), advantages, tau_positive, tau_negative) * advantages


def negative_aware(
  log_ratio: Array, advantages: Array, success_rate: Array, *, limit: float = 10.0
) -> Array:
  """Likelihood of right rows under pi, of wrong rows under an implied policy: NFT (arXiv:2505.18116).

  With q the success rate of the group, pi_old = q pi + (1 - q) pi_wrong defines pi_wrong, the policy
  of wrong answers. Right rows (A = c) have the loss -c log r. Wrong rows (A = -c) have the loss

      -c log max((1 - q r) / (1 - q), 1),

  where the maximum acts on the value and its gradient is passed straight through, so wrong tokens with
  r >= 1 keep a gradient. The gradient weight of log pi is c for right rows and
  -c q r / max(1 - q r, 1 - q) for wrong rows. On-policy, c = 1 - q gives the weights R - q.

  log r is cut at `limit` nats first, and a token beyond it has gradient 0. The weight of a wrong row
  tends to 0 with r. At r <= 1 its size is at most c q / (1 - q) <= 49 c; at r >= 1 it is
  c q r / (1 - q), which grows linearly with r up to 49 exp(10) c, about 1.1e6 c.

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T], +c where the answer is right and -c where it is wrong.
    success_rate: f32[B], q of the row's group; clipped to [0.02, 0.98] as published.
    limit: largest log-ratio, nats.

  Returns:
    [B, T].

  >>> log_ratio, advantages = jnp.log(jnp.array([[1.5], [0.5]])), jnp.array([[1.0], [-1.0]])
  >>> loss = surrogates.negative_aware(log_ratio, advantages, jnp.array([0.5, 0.5]))
  >>> print(np.asarray(loss[:, 0]).round(2))
  [-0.41 -0.41]
  """
  log_ratio, advantages = finite_gradient(log_ratio, advantages)
  chex.assert_shape(success_rate, log_ratio.shape[:1])
  log_ratio = jnp.where(log_ratio > limit, limit, log_ratio)
  q = jnp.clip(success_rate, 0.02, 0.98)[:, None]
  wrong = (1 - q * jnp.exp(log_ratio)) / (1 - q)
  # The value is max(wrong, 1); the gradient is that of `wrong`.
  fixed = jax.lax.stop_gradient(wrong)
  wrong = jnp.maximum(fixed, 1) + (wrong - fixed)
  return -advantages * jnp.where(advantages < 0, -jnp.log(wrong), log_ratio)


def probability_shaped(logp: Array, advantages: Array, *, gamma: float = 0.1) -> Array:
  """-A p / (p + gamma), p = pi(token): the off-policy part of LUFFY (arXiv:2504.14945).

  The gradient weight of log pi is A gamma p / (p + gamma)^2, which is largest at p = gamma. So the
  tokens of a demonstration that are learned most are unlikely under the policy, but not nearly
  impossible.

  Args:
    logp: [..., T], nats.
    advantages: [..., T].
    gamma: the probability at which the gradient weight is largest.

  Returns:
    [..., T].

  Raises:
    ValueError: gamma <= 0.

  >>> logp = jnp.log(jnp.array([0.01, 0.1, 0.9]))
  >>> loss = surrogates.probability_shaped(logp, jnp.ones(3))
  >>> print(np.asarray(loss).round(2))
  [-0.09 -0.5  -0.9 ]
  """
  logp, advantages = finite_gradient(logp, advantages)
  if gamma <= 0:
    raise ValueError(f'gamma must be positive, got {gamma}')
  return -advantages * jax.nn.sigmoid(logp - jnp.log(gamma))  # p / (p + gamma), without overflow


def probability_power(logp: Array, advantages: Array, *, exponent: Positive = 0.5) -> Array:
  """-A p^exponent, p = pi(token): other shapes of LUFFY's code (arXiv:2504.14945).

  The gradient weight of log pi is A exponent p^exponent. 1 is the probability itself, as in DFT with an
  advantage, and 1/2 its root; divided by the exponent, 0 would be `reinforce`.

  Args:
    logp: [..., T], nats.
    advantages: [..., T].
    exponent: of the probability.

  Returns:
    [..., T].

  >>> logp = jnp.log(jnp.array([0.01, 0.09, 0.81]))
  >>> print(np.asarray(surrogates.probability_power(logp, jnp.ones(3))).round(2))
  [-0.1 -0.3 -0.9]
  """
  logp, advantages = finite_gradient(logp, advantages)
  return -advantages * jnp.exp(exponent * logp)


def _pessimistic(ratio: Array, advantages: Array, low: Array | float, high: Array | float) -> Array:
  """-min(r A, clip(r, low, high) A): only `high` can be active for A >= 0, only `low` for A < 0."""
  bound = jnp.where(advantages >= 0, high, low).astype(ratio.dtype)
  return -advantages * jnp.where(kept(ratio, advantages, low, high), ratio, bound)


def _capped(loss: Array, log_ratio: Array, advantages: Array, cap: float) -> Array:
  """The loss, and -cap A where A < 0 and r > cap."""
  if cap <= 1:
    raise ValueError(f'cap is an absolute ratio and must exceed 1, got {cap}')
  cap = jnp.minimum(cap, jnp.exp(LIMIT))  # the largest ratio; infinity would make gradients NaN
  capped = (advantages < 0) & (jnp.exp(log_ratio) > cap)
  return jnp.where(capped, -cap * advantages, loss)


TABLE = table(
  'surrogates',
  reinforce,
  importance_weighted,
  clipped,
  clipped_between,
  clipped_away,
  dual_clipped,
  two_level_clipped,
  drift,
  entropy_adaptive,
  centered_clip,
  flipped,
  gradient_preserving,
  truncated,
  soft_gated,
  negative_aware,
  probability_shaped,
  probability_power,
  path_consistency,
)
Part = Annotated[Callable, TABLE]
