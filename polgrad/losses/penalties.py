"""Token penalties: losses that are added to the surrogate, each with its own coefficient and metric.

A function of `TABLE` fills one of the `penalties` of `objectives.PolicyGradient`, or the slot `loss`
of `objectives.Supervised`.

The KL estimators use delta = logp - reference_logp of tokens that the policy sampled. What matters
in a loss is the expected *gradient*, not the value (arXiv:2506.09477). On-policy, with the tokens
before t held fixed, the expected gradient is

    k1              0: the score has mean zero, so the penalty adds only noise
    k2              grad KL(pi || reference)
    k3              grad KL(reference || pi): the other direction
    importance_k3   grad KL(pi || reference), also for off-policy tokens
    importance_k1   the same, with more noise

These gradients ignore that an early token changes the prefixes of later ones. To include that effect,
subtract k1 from the reward of each token and use rewards to go (`kl_coefficient` in `credit`).

A token whose input is NaN or infinite has gradient exactly 0, so that a masked token cannot spoil the
gradient of a mean over the others. Its penalty is not repaired: if the token counts, the mean is NaN.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._common import bounded, finite_gradient
from polgrad.losses.path_consistency import following_token
from polgrad.registry import Fraction, NotNegative, Positive, Range, table
from polgrad.types import Array


def k1(logp: Array, reference_logp: Array) -> Array:
  """delta: unbiased for KL(pi || reference) as a value (standard; arXiv:2506.09477).

  As a loss its expected gradient is 0. Use it as a reward or as a metric.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats.

  Returns:
    [..., T], nats; single entries can be negative.
  """
  logp, reference_logp = finite_gradient(logp, reference_logp)
  return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
  """delta^2 / 2: the expected gradient is exactly that of KL(pi || reference) (arXiv:2506.09477).

  The expected value agrees with the KL to second order only.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats.

  Returns:
    [..., T], >= 0.
  """
  logp, reference_logp = finite_gradient(logp, reference_logp)
  return 0.5 * jnp.square(logp - reference_logp)


def squared_log_ratio(log_ratio: Array) -> Array:
  """log_ratio^2 / 2: `k2` with pi_old, the denominator of the ratio, as the reference.

  The expected value is KL(pi || pi_old) to second order: the mirror descent of Kimi k1.5
  (arXiv:2501.12599), per token.

  Args:
    log_ratio: [..., T], log pi - log pi_old, nats; carries gradient.

  Returns:
    [..., T], >= 0.
  """
  (log_ratio,) = finite_gradient(log_ratio)
  return 0.5 * jnp.square(log_ratio)


def k3(logp: Array, reference_logp: Array, *, limit: float = 1e9) -> Array:
  """min(exp(-delta) - 1 + delta, limit): GRPO's penalty (arXiv:2402.03300).

  As a value it is unbiased for KL(pi || reference) and never negative. As a loss its expected gradient
  is that of KL(reference || pi), the mass-covering direction. delta is clamped to +-20 nats. An entry
  that is clamped, or that exceeds the limit, has gradient 0. The paper has no limit; some code bases
  have 10.

  Args:
    logp: [..., T], nats.
    reference_logp: [..., T], nats.
    limit: largest penalty of a token, nats. The default is beyond what a clamped delta can give, so
      nothing is limited.

  Returns:
    [..., T], in [0, limit].
  """
  logp, reference_logp = finite_gradient(logp, reference_logp)
  delta = bounded(logp - reference_logp)
  return jnp.minimum(jnp.expm1(-delta) + delta, limit)


def importance_k1(log_ratio: Array, logp: Array, reference_logp: Array) -> Array:
  """r delta with gradient also through r: an off-policy KL(pi || reference) (standard;
  arXiv:2506.09477).

  Its gradient is r (delta + 1) grad logp. For tokens sampled by the old policy the expected value is
  KL(pi || reference) and the expected gradient is that of the KL, as for `importance_k3`; r grad logp
  has mean zero and only adds noise.

  Args:
    log_ratio: [..., T], log pi - log pi_old, nats; carries gradient.
    logp: [..., T], nats.
    reference_logp: [..., T], nats.

  Returns:
    [..., T], nats; single entries can be negative.
  """
  log_ratio, logp, reference_logp = finite_gradient(log_ratio, logp, reference_logp)
  return jnp.exp(log_ratio) * (logp - reference_logp)


def importance_k3(log_ratio: Array, logp: Array, reference_logp: Array) -> Array:
  """r k3 with gradient also through r: the unbiased KL of DeepSeek-V3.2 (arXiv:2512.02556).

  Its gradient is r delta grad logp, which is that of sg(r) k2 for every token. So for tokens sampled by
  the old policy the expected gradient is that of KL(pi || reference); on-policy (r = 1) the gradient
  is that of `k2`.

  Args:
    log_ratio: [..., T], log pi - log pi_old, nats; carries gradient.
    logp: [..., T], nats.
    reference_logp: [..., T], nats.

  Returns:
    [..., T], >= 0.
  """
  log_ratio, logp, reference_logp = finite_gradient(log_ratio, logp, reference_logp)
  return jnp.exp(log_ratio) * k3(logp, reference_logp)


def easy_k3(
  logp: Array,
  reference_logp: Array,
  advantages: Array,
  success_rate: Array,
  *,
  rate: NotNegative = 2.71828,
) -> Array:
  """(1 - exp(-rate p)) k3 where A > 0 and 0 < p < 1, else k3: difficulty-adaptive divergence shaping of
  APO (arXiv:2506.21655).

  p is the share of right rows of the group, so good answers to hard prompts may leave the reference.

  Args:
    logp: [B, T], nats; carries gradient.
    reference_logp: [B, T], nats.
    advantages: [B, T].
    success_rate: [B], p.
    rate: how fast the weight grows with p; the authors' is Euler's number.

  Returns:
    [B, T], >= 0.
  """
  chex.assert_rank([logp, success_rate], [2, 1])
  chex.assert_equal_shape([logp, reference_logp, advantages])
  chex.assert_equal_shape_prefix([logp, success_rate], 1)
  logp, reference_logp, advantages = finite_gradient(logp, reference_logp, advantages)
  p = jax.lax.stop_gradient(success_rate)[:, None]
  weight = jnp.where((advantages > 0) & (p > 0) & (p < 1), -jnp.expm1(-rate * p), 1)
  weight = jnp.where(jnp.isnan(advantages), advantages, weight)
  return weight * k3(logp, reference_logp)


def negative_entropy(entropy: Array) -> Array:
  """-H: minimising it raises the entropy (standard; arXiv:1602.01783).

  Args:
    entropy: [..., T], nats, of the whole next-token distribution; carries gradient.

  Returns:
    [..., T].
  """
  return -entropy


def value_error(values: Array, returns: Array) -> Array:
  """(V - return)^2 / 2: the critic's regression (standard).

  Args:
    values: [..., T], in units of the return; carries gradient.
    returns: [..., T], constant.

  Returns:
    [..., T].
  """
  values, returns = finite_gradient(values, returns)
  return 0.5 * jnp.square(values - returns)


def huber_value_error(values: Array, returns: Array, *, delta: float = 1.0) -> Array:
  """e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2), e = V - return: Huber's loss (standard).

  The gradient is e clipped to +-delta, so a single return far from the value cannot dominate the batch.

  Args:
    values: [..., T], V, in units of the return; carries gradient.
    returns: [..., T], constant.
    delta: error from which on the loss is linear, in units of the return; infinite gives `value_error`.

  Returns:
    [..., T], >= 0.

  Raises:
    ValueError: delta <= 0.
  """
  if delta <= 0:
    raise ValueError(f'delta must be positive, got {delta}')
  values, returns = finite_gradient(values, returns)
  error = values - returns
  near = jnp.clip(error, -delta, delta)
  return near * (error - near / 2)


def clipped_value_error(
  values: Array, old_values: Array, returns: Array, *, eps: float = 0.2
) -> Array:
  """max of `value_error` at V and at clip(V, V_old - eps, V_old + eps) (arXiv:2005.12729).

  The gradient is 0 where V has moved towards the return by more than eps, unless it has moved so far
  past the return that the error at V is larger than the error at the clipped value.

  Args:
    values: [..., T], V; carries gradient.
    old_values: [..., T], V_old, values at the start of the phase, constant.
    returns: [..., T], constant.
    eps: largest change of the clipped value, in units of the return.

  Returns:
    [..., T].
  """
  values, old_values, returns = finite_gradient(values, old_values, returns)
  near = old_values + jnp.clip(values - old_values, -eps, eps)
  return jnp.maximum(value_error(values, returns), value_error(near, returns))


def nll(logp: Array, *, cutoff: Annotated[float, Range(above=0, at_most=1)] = 1.0) -> Array:
  """-min(log pi, log cutoff): the negative log-likelihood of the token, as in supervised learning
  (standard).

  As a penalty with coefficient c it acts like a baseline that is lower by c: AsymRE (arXiv:2506.20520).
  Tokens with a probability above `cutoff` are known well enough and have no gradient (an option of the
  code of CHORD, arXiv:2508.11408); at 1 all tokens are learned.

  Args:
    logp: [..., T], nats.
    cutoff: probability above which a token is not learned.

  Returns:
    [..., T].
  """
  least = jnp.where(cutoff < 1, jnp.log(cutoff), jnp.inf)
  return -jnp.where(logp > least, least, logp)


def unlikelihood(logp: Array, *, floor: Positive = 1e-5) -> Array:
  """-log max(1 - pi, floor) of the token itself: its unlikelihood (arXiv:1908.04319).

  Its derivative by log pi is pi / (1 - pi), or 0 where 1 - pi is below the floor.

  Args:
    logp: [..., T], log pi, nats.
    floor: least value of 1 - pi.

  Returns:
    [..., T], nats, >= 0.
  """
  (logp,) = finite_gradient(logp)
  return -jnp.log(jnp.maximum(-jnp.expm1(logp), floor))


def inverse_soft_q(
  logp: Array, log_normalizer: Array, mask: Array, *, discount: Fraction = 1.0
) -> Array:
  """delta_t^2 of the reward delta that the logits imply as Q values: IQ-Learn (arXiv:2409.01369).

      delta_t = v_t + log pi_t - discount v_{t+1},   v = logsumexp(logits)

  v_t + log pi_t is the logit of the token, and v is 0 after the last one. Added to the likelihood of
  demonstrations with a coefficient, it makes the logits consistent values; 0 is supervised learning.
  With discount 1 the deltas of a row add up to v_1 + log pi of the row, and with discount 0 the
  penalty is the squared logit of the token.

  Args:
    logp: [B, T], nats.
    log_normalizer: [B, T], nats, logsumexp of the logits that score each token; carries gradient.
    mask: bool[B, T]; masked tokens between valid ones are skipped.
    discount: of the next value.

  Returns:
    [B, T], >= 0; 0 where `mask` is False.

  Confidence: PAPER.
  """
  chex.assert_equal_shape([logp, log_normalizer, mask])
  logp, values = finite_gradient(logp, log_normalizer)
  logp, values = jnp.where(mask, logp, 0), jnp.where(mask, values, 0)
  following = jnp.pad(values, ((0, 0), (0, 1)))
  following = jnp.take_along_axis(following, following_token(mask, 1), axis=1)
  return jnp.where(mask, (values + logp - discount * following) ** 2, 0)


def selected_absolute(log_ratio: Array, selected: Array) -> Array:
  """|log_ratio| of the selected tokens, 0 elsewhere: KL-Cov (arXiv:2505.22617).

  The gradient is the sign of the log-ratio; it is 0 where policy and old policy agree.

  Args:
    log_ratio: [..., T], log pi - log pi_old, nats; carries gradient.
    selected: bool[..., T].

  Returns:
    [..., T], >= 0.
  """
  chex.assert_equal_shape([log_ratio, selected])
  (log_ratio,) = finite_gradient(log_ratio)
  # Not jnp.abs, whose derivative at 0 is 1 in JAX.
  return jnp.where(selected, log_ratio * jnp.sign(log_ratio), 0)


def selected_k3(logp: Array, proxy_logp: Array, selected: Array) -> Array:
  """min(k3 to the proxy, 10) of the selected tokens, 0 elsewhere: Lp-Reg (arXiv:2510.03222).

  The proxy is the policy without its least likely tokens (`logit_stats.proxy_logp`). The penalty raises
  the likelihood of a selected token while it is below that under the proxy.

  Args:
    logp: [..., T], nats.
    proxy_logp: [..., T], nats, constant.
    selected: bool[..., T], for example from `selections.unlikely`.

  Returns:
    [..., T], in [0, 10]; the gradient is 0 where k3 exceeds 10.
  """
  chex.assert_equal_shape([logp, proxy_logp, selected])
  return jnp.where(selected, k3(logp, proxy_logp, limit=10.0), 0)


def turn_k2(logp: Array, reference_logp: Array, turn_ids: Array, *, turn: int = 0) -> Array:
  """`k2` in the tokens of one turn, 0 elsewhere: it keeps the first answer near the reference in stage I
  of SCoRe (arXiv:2409.12917).

  Args:
    logp: [B, T], nats.
    reference_logp: [B, T], nats.
    turn_ids: i32[B, T], number of the turn of each token, from 0.
    turn: number of the turn.

  Returns:
    [B, T], >= 0.
  """
  chex.assert_equal_shape([logp, reference_logp, turn_ids])
  return jnp.where(turn_ids == turn, k2(logp, reference_logp), 0)


def entropy_band(
  entropy: Array, mean_entropy: Array, *, low: float = 0.8, high: float = 1.2
) -> Array:
  """relu(low H' - H) + relu(H - high H'), H' the mean entropy of earlier updates.

  A variant of the band of EPO (arXiv:2509.22576) that has a gradient; `entropy_band_published` has none.
  The paper does not contain this variant.

  Args:
    entropy: [..., T], H, nats; carries gradient.
    mean_entropy: [], H', nats; <= 0 while there are no earlier updates.
    low: lower edge of the band, in units of H'.
    high: upper edge of the band, in units of H'.

  Returns:
    [..., T], >= 0; 0 where H' <= 0.
  """
  chex.assert_rank(mean_entropy, 0)
  below = jnp.maximum(low * mean_entropy - entropy, 0)
  above = jnp.maximum(entropy - high * mean_entropy, 0)
  return jnp.where(mean_entropy > 0, below + above, 0)


def entropy_band_published(
  entropy: Array, mean_entropy: Array, *, low: float = 0.8, high: float = 1.2, height: float = 0.1
) -> Array:
  """`height` outside the band (low H', high H'), 0 inside: the smoothing penalty of EPO as released
  (arXiv:2509.22576).

  The penalty is piecewise constant, so its gradient is 0: it changes the reported loss but no
  parameter.

  Args:
    entropy: [..., T], H, nats.
    mean_entropy: [], H', nats, the mean entropy of earlier updates; <= 0 while there are none.
    low: lower edge of the band, in units of H'.
    high: upper edge of the band, in units of H'.
    height: the penalty, alpha in the paper.

  Returns:
    [..., T]; 0 where H' <= 0.
  """
  chex.assert_rank(mean_entropy, 0)
  inside = (entropy > low * mean_entropy) & (entropy < high * mean_entropy)
  return jnp.where(inside | (mean_entropy <= 0), 0, jnp.full_like(entropy, height))


TABLE = table(
  'penalties',
  k1,
  k2,
  squared_log_ratio,
  k3,
  importance_k1,
  importance_k3,
  easy_k3,
  negative_entropy,
  value_error,
  huber_value_error,
  clipped_value_error,
  nll,
  unlikelihood,
  inverse_soft_q,
  selected_absolute,
  selected_k3,
  turn_k2,
  entropy_band,
  entropy_band_published,
)
Part = Annotated[Callable, TABLE]
