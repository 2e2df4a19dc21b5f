"""Selections: which tokens of a whole minibatch a loss treats differently, bool[B, T].

A function of `TABLE` fills one of the `selections` of `objectives.PolicyGradient`; weights and
penalties read the result by its name in the configuration. A rank, a covariance or a fraction depends
on all tokens together, so a selection is evaluated once per update on the whole minibatch, before it is
split into micro-batches. No gradient flows through it.

No token outside the mask is selected. Tokens with equal scores are ranked by row, then by position.
Five functions return numbers: `balanced_bounds` and `second_moment_bounds` the bounds of a trust region,
f32[2]; `self_normalized` and `per_prompt` weights of tokens and `signed_entropy` another number of each,
f32[B, T], which are 0 outside the mask.

A selection can be used in two ways. As a weight (`weights.selected`) it multiplies the loss, and a token
that it drops still counts in the denominator of the mean. As `only` of the objective it also takes the
token out of the denominator.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import turns
from polgrad.losses._common import (
  LIMIT,
  bounded,
  geometric_ratio,
  kept,
  row_ratio,
  token_ratio,
  truncate,
  within,
)
from polgrad.losses.groups import divide, same, size, total
from polgrad.registry import Fraction, NotNegative, Range, table
from polgrad.types import Array


def second_moment(
  log_ratio: Array,
  advantages: Array,
  mask: Array,
  *,
  limit: Annotated[float, Range(at_least=0)] = 0.04,
) -> Array:
  """Tokens to keep, so that the second moment of the log-ratio is limited: algorithm 1 of M2PO
  (arXiv:2510.01161), as in Trinity-RFT. The authors' code is `second_moment_bounds`.

  With d = log_ratio, only tokens that moved in the direction of their advantage (A d > 0) can be
  dropped. These tokens are sorted by increasing d^2, and the longest prefix whose mean d^2 is at most
  `limit` is kept.

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    limit: largest mean of d^2 over the kept tokens with A d > 0, nats^2.

  Returns:
    bool[B, T], True where a token is kept.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  moved = mask & (advantages * log_ratio > 0)
  moment = jnp.where(moved, log_ratio, 0) ** 2
  rank = _rank(moment, moved)
  # Sorted squares, and the mean of each prefix.
  ordered = jnp.zeros(mask.size, moment.dtype).at[rank.ravel()].set(moment.ravel())
  # The mean of a prefix grows with its length, so `mean <= limit` holds for one prefix.
  mean = jnp.cumsum(ordered) / jnp.arange(1, mask.size + 1)
  return mask & (~moved | (mean <= limit)[rank])


def second_moment_bounds(
  log_ratio: Array,
  advantages: Array,
  mask: Array,
  *,
  limit: Annotated[float, Range(at_least=0)] = 0.04,
  low: float = 0.7,
  high: float = 1.5,
) -> Array:
  """Clip bounds that limit the second moment of the log-ratio: M2PO (arXiv:2510.01161) in its code.

  With d = log_ratio, only tokens that moved in the direction of their advantage (A d > 0) count. If
  their mean d^2 is above `limit`, the bounds are exp(-tau) and exp(tau), where tau is the largest |d|
  of such a token for which the mean of min(d^2, tau^2) is below `limit`, or 0 if there is none. The
  bounds are at least as wide as [low, high]. If the mean d^2 is not above `limit`, nothing is clipped:
  the bounds are 0 and exp(20), the largest ratio after the clamp of log-ratios.

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    limit: largest mean of d^2, nats^2.
    low: largest value of the lower bound, a ratio.
    high: smallest value of the upper bound, a ratio.

  Returns:
    f32[2], the ratios (lower bound, upper bound).

  Raises:
    ValueError: low <= 1 <= high does not hold, so on-policy tokens could be clipped.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  if not low <= 1 <= high:
    raise ValueError(f'low <= 1 <= high must hold for ratios, got {low} and {high}')
  log_ratio = jax.lax.stop_gradient(log_ratio)
  moved = mask & (advantages * log_ratio > 0)
  square = jnp.sort(jnp.where(moved, bounded(log_ratio) ** 2, jnp.inf), axis=None)
  index, count = jnp.arange(square.size), jnp.sum(moved)
  square = jnp.where(index < count, square, 0)
  # Sum of min(d^2, tau^2) for each tau^2 in `square`: smaller squares, and tau^2 for all larger ones.
  capped = jnp.cumsum(square) + (count - 1 - index) * square
  small = (index < count) & (capped < limit * count)
  tau = jnp.sqrt(jnp.max(jnp.where(small, square, 0)))
  bounds = jnp.stack([jnp.minimum(jnp.exp(-tau), low), jnp.maximum(jnp.exp(tau), high)])
  no_bounds = jnp.array([0.0, jnp.exp(LIMIT)], bounds.dtype)
  return jnp.where(jnp.sum(square) > limit * count, bounds, no_bounds)


def top_covariance(logp: Array, advantages: Array, mask: Array, *, share: float = 0.0002) -> Array:
  """The tokens with the largest (A - mean A)(log pi - mean log pi): KL-Cov (arXiv:2505.22617).

  To first order, the updates of these tokens lower the entropy most. max(int(share n), 1) of the n
  valid tokens are selected.

  Args:
    logp: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    share: fraction of the valid tokens to select.

  Returns:
    bool[B, T], True where a token is selected.
  """
  covariance = _covariance(logp, advantages, mask)
  return mask & (_rank(-covariance, mask) < jnp.maximum(_part(share, mask), 1))


def random_covariance(
  logp: Array,
  log_ratio: Array,
  advantages: Array,
  mask: Array,
  noise: Array,
  *,
  share: float = 0.0002,
  low: float = 1.0,
  high: float = 5.0,
  eps_low: float = 1.0,
  eps_high: float = 1.0,
) -> Array:
  """Random tokens among those with a high covariance: Clip-Cov (arXiv:2505.22617).

  Candidates have low < (A - mean A)(log pi - mean log pi) < high and are not clipped by the surrogate.
  Of these, the max(int(share n), 1) tokens with the smallest noise are selected, with n the number of
  valid tokens.

  Args:
    logp: [B, T], nats.
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    noise: f32[B, T], uniform random numbers in [0, 1).
    share: fraction of the valid tokens to select.
    low: lower bound of a candidate's covariance, exclusive.
    high: upper bound of a candidate's covariance, exclusive.
    eps_low: distance of the surrogate's lower clip bound from 1.
    eps_high: distance of the surrogate's upper clip bound from 1.

  Returns:
    bool[B, T], True where a token is selected.
  """
  chex.assert_equal_shape([logp, log_ratio, noise])
  covariance = _covariance(logp, advantages, mask)
  live = kept(jnp.exp(bounded(log_ratio)), advantages, 1 - eps_low, 1 + eps_high)
  candidates = mask & live & (covariance > low) & (covariance < high)
  return candidates & (_rank(noise, candidates) < jnp.maximum(_part(share, mask), 1))


def unlikely(
  logp: Array, proxy_logp: Array, advantages: Array, mask: Array, *, share: float = 0.01
) -> Array:
  """Unlikely tokens with A < 0 that a penalty should protect: Lp-Reg (arXiv:2510.03222).

  Among the n valid tokens with A < 0, the int(share n) least likely ones are candidates. A candidate is
  selected if the proxy gives it a higher probability than the policy. As in the published code, none
  is selected if int(share n) < 2.

  Args:
    logp: [B, T], nats.
    proxy_logp: [B, T], log-probability of the token under the proxy (`logit_stats.proxy_logp`), nats.
    advantages: [B, T].
    mask: bool[B, T].
    share: fraction of the valid tokens with A < 0 that are candidates.

  Returns:
    bool[B, T], True where a token is selected.
  """
  chex.assert_equal_shape([logp, proxy_logp, advantages, mask])
  bad = mask & (advantages < 0)
  count = _part(share, bad)
  lowest = bad & (_rank(logp, bad) < count) & (count > 1)
  return lowest & (logp < proxy_logp)


def top_entropy(entropy: Array, mask: Array, *, share: float = 0.2) -> Array:
  """Tokens whose entropy reaches the (1 - share) quantile of the batch: the 80/20 rule
  (arXiv:2506.01939).

  The quantile is that of the valid tokens, interpolated linearly. Equal entropies are all selected.

  Args:
    entropy: [B, T], of the next-token distribution, nats.
    mask: bool[B, T].
    share: fraction of the valid tokens to select, in [0, 1].

  Returns:
    bool[B, T], True where a token is selected.

  Raises:
    ValueError: a share outside [0, 1].
  """
  chex.assert_equal_shape([entropy, mask])
  if not 0 <= share <= 1:
    raise ValueError(f'share must lie in [0, 1], got {share}')
  ordered = jnp.sort(jnp.where(mask, entropy, jnp.inf), axis=None)
  # The factor is for a product that should be a whole number but is rounded up.
  place = (1 - share) * (1 - 1e-6) * jnp.maximum(jnp.sum(mask) - 1, 0).astype(entropy.dtype)
  below, above = (ordered[f(place).astype(jnp.int32)] for f in (jnp.floor, jnp.ceil))
  # Of equal neighbours the difference is exactly 0; there is no other one to subtract from infinity.
  step = jnp.where(above > below, above - below, 0)
  return mask & (entropy >= below + step * (place - jnp.floor(place)))


def uncertain_hints(
  entropy: Array, injected: Array, mask: Array, *, share: Fraction = 0.2
) -> Array:
  """All tokens that the policy drew, and the given ones of highest entropy: IGPO (arXiv:2509.10396).

  Of the n given tokens of the batch, int(share n) are selected. So a hint is imitated where the policy
  was unsure, and not where it would have written the same. A share of 0 imitates nothing, and 1 all.

  Args:
    entropy: [B, T], of the next-token distribution, nats.
    injected: [B, T], 1 for given tokens, 0 for others.
    mask: bool[B, T].
    share: fraction of the given tokens to select.

  Returns:
    bool[B, T], True where a token is selected.
  """
  chex.assert_equal_shape([entropy, injected, mask])
  given = mask & (injected > 0)
  return mask & (~given | (_rank(-entropy, given) < _part(share, given)))


def signed_entropy(
  entropy: Array, mask: Array, *, share: float = 0.8, released_sign: bool = False
) -> Array:
  """How far log H lies above or below its quantile, in [-1, 1]: HAPO (arXiv:2509.16591).

  h = log H - p, with p the quantile of log H over the valid tokens that is the nearest of their values.
  The result is h / max h where h > 0 and h / |min h| elsewhere: 1 at the highest entropy of the batch,
  -1 at the lowest, 0 at the quantile.

  Args:
    entropy: [B, T], H of the next-token distribution, nats; at least 1e-8 is taken.
    mask: bool[B, T].
    share: fraction of the tokens below the quantile, in [0, 1].
    released_sign: tokens below the quantile get |h / min h| in [0, 1], as in the released code, in which
      the lowest entropies therefore count as high ones.

  Returns:
    f32[B, T], 0 outside the mask.

  Raises:
    ValueError: a share outside [0, 1].
  """
  chex.assert_equal_shape([entropy, mask])
  if not 0 <= share <= 1:
    raise ValueError(f'share must lie in [0, 1], got {share}')
  levels = entropy_levels(entropy, mask, share=share)
  scaled = jnp.where(mask, scaled_entropy(jnp.where(mask, entropy, 1), levels), 0)
  return jnp.abs(scaled) if released_sign else scaled


def entropy_levels(entropy: Array, mask: Array, *, share: float = 0.8) -> Array:
  """The three numbers by which `scaled_entropy` measures an entropy: HAPO (arXiv:2509.16591).

  Args:
    entropy: [B, T], nats; at least 1e-8 is taken.
    mask: bool[B, T].
    share: fraction of the tokens below the quantile, in [0, 1].

  Returns:
    f32[3]: the quantile p of log H over the valid tokens, max(log H - p), and max(p - log H). All are 0
    without valid tokens.
  """
  level = jnp.where(mask, jnp.log(jnp.maximum(jnp.where(mask, entropy, 1), 1e-8)), jnp.inf)
  place = jnp.round(share * jnp.maximum(jnp.sum(mask) - 1, 0)).astype(jnp.int32)
  quantile = jnp.where(jnp.any(mask), jnp.sort(level, axis=None)[place], 0)
  gap = jnp.where(mask, level - quantile, 0)
  return jnp.stack([quantile, jnp.max(gap), jnp.max(-gap)])


def scaled_entropy(entropy: Array, levels: Array) -> Array:
  """h = log H - p, divided by its largest value where h > 0, and by its largest size elsewhere.

  Args:
    entropy: [...], nats; at least 1e-8 is taken.
    levels: f32[3] of `entropy_levels`. Zeros give 0 everywhere.

  Returns:
    [...], in [-1, 1] for the tokens that the levels were measured on.
  """
  quantile, above, below = levels
  gap = jnp.log(jnp.maximum(entropy, 1e-8)) - quantile
  return jnp.where(gap > 0, divide(gap, above), divide(gap, below))


def token_band(
  proximal_logp: Array, behavior_logp: Array, mask: Array, *, low: float = 0.5, high: float = 5.0
) -> Array:
  """Tokens to keep: low <= rho <= high, as `weights.masked_importance`, here as a rejection
  (arXiv:2510.18855).

  rho = pi_proximal / pi_behavior. Named by `only` of the objective, a rejected token is left out of the
  denominator as well.

  Args:
    proximal_logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    mask: bool[B, T].
    low: smallest ratio that is kept.
    high: largest ratio that is kept.

  Returns:
    bool[B, T], True where a token is kept.
  """
  chex.assert_equal_shape([proximal_logp, behavior_logp, mask])
  return mask & within(token_ratio(proximal_logp, behavior_logp), low, high)


def sequence_band(
  proximal_logp: Array, behavior_logp: Array, mask: Array, *, low: float = 0.0, high: float = 3.0
) -> Array:
  """Rows to keep: low <= prod_t rho_t <= high, as `weights.masked_sequence_importance`, here as a
  rejection (arXiv:2510.18855).

  Args:
    proximal_logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    mask: bool[B, T].
    low: smallest ratio of a row that is kept.
    high: largest ratio of a row that is kept.

  Returns:
    bool[B, T], True at all valid tokens of the rows that are kept.
  """
  return mask & within(row_ratio(proximal_logp, behavior_logp, mask), low, high)


def geometric_band(
  proximal_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  low: float = 0.999,
  high: float = 1.001,
) -> Array:
  """Rows to keep: low <= (prod_t rho_t)^(1/L) <= high, as `weights.geometric_band`, here as a rejection
  (standard).

  Args:
    proximal_logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    mask: bool[B, T].
    low: smallest geometric mean that is kept.
    high: largest geometric mean that is kept.

  Returns:
    bool[B, T], True at all valid tokens of the rows that are kept.
  """
  return mask & within(geometric_ratio(proximal_logp, behavior_logp, mask), low, high)


def central_turns(
  logp: Array,
  rewards: Array,
  turn_ids: Array,
  mask: Array,
  *,
  low: Fraction = 0.1,
  high: Fraction = 0.9,
) -> Array:
  """Turns of right rows that are neither mastered nor noise: adaptive filtering of BFS-Prover-V2
  (arXiv:2509.06493).

  Of the turns of rows with a reward above 1/2, those are kept whose negative log-likelihood per token
  lies between the quantiles `low` and `high` of all these turns, bounds included. low = 0 and high = 1
  keep all, and so do equal likelihoods. A row without replies is one turn.

  Args:
    logp: [B, T], nats.
    rewards: [B].
    turn_ids: i32[B, T], number of the turn of each token, from 0.
    mask: bool[B, T].
    low: the quantile below which turns are known already.
    high: the quantile above which turns are noise.

  Returns:
    bool[B, T], True at the tokens of the turns that are kept.

  Raises:
    ValueError: low > high.
  """
  if low > high:
    raise ValueError(f'low must be at most high, got {low} and {high}')
  chex.assert_rank([logp, rewards], [2, 1])
  chex.assert_equal_shape([logp, turn_ids, mask])
  chex.assert_equal_shape_prefix([logp, rewards], 1)
  right = turns.present(turn_ids, mask) & (rewards > 0.5)[:, None]
  surprise = -turns.means(jnp.where(mask, logp, 0), turn_ids, mask)
  least, most = (_quantile(surprise, right, share) for share in (low, high))
  kept = right & (surprise >= least) & (surprise <= most)
  return turns.at_tokens(kept, turn_ids, mask) > 0


def self_normalized(
  proximal_logp: Array, behavior_logp: Array, mask: Array, *, cap: float = 2.0, floor: float = 0.0
) -> Array:
  """w / (mean of w over the valid tokens of the batch), w = clip(rho, floor, cap): self-normalised
  importance weights (Hesterberg 1995; standard).

  Truncation makes the weights smaller on average; the division makes their mean 1 again, so the step
  size does not depend on how far the sampler is from the trainer. `weights.normalized` multiplies the
  loss by the result, under the name `normalized_weights`.

  Args:
    proximal_logp: [B, T], nats.
    behavior_logp: [B, T], nats.
    mask: bool[B, T].
    cap: largest w.
    floor: smallest w.

  Returns:
    f32[B, T], 0 outside the mask; their mean over the valid tokens is 1.

  Raises:
    ValueError: a floor outside [0, cap].
  """
  chex.assert_equal_shape([proximal_logp, behavior_logp, mask])
  truncated = truncate(token_ratio(proximal_logp, behavior_logp), floor, cap)
  truncated = jnp.where(mask, truncated, 0)
  return truncated * divide(jnp.sum(mask).astype(truncated.dtype), jnp.sum(truncated))


def excess_drift(
  log_ratio: Array, mask: Array, *, coefficient: NotNegative = 1e3, limit: NotNegative = 1e-4
) -> Array:
  """max(coefficient (D - limit), 0) with D the mean of -log_ratio over the valid tokens: DRPO
  (arXiv:2510.04474).

  D estimates KL(old policy, policy). Inside a region of radius `limit` nothing is penalised.

  Args:
    log_ratio: [B, T], log pi - log pi_old, nats.
    mask: bool[B, T].
    coefficient: slope beyond the limit.
    limit: nats.

  Returns:
    f32[], the coefficient of a penalty.
  """
  chex.assert_equal_shape([log_ratio, mask])
  drift = -jnp.sum(jnp.where(mask, log_ratio, 0)) / jnp.maximum(jnp.sum(mask), 1)
  return jnp.maximum(coefficient * (jax.lax.stop_gradient(drift) - limit), 0)


def per_prompt(group_ids: Array, mask: Array) -> Array:
  """n / (N n_g) at the n_g tokens of group g, of N groups with tokens and n tokens in the batch: with
  these weights a mean over tokens is the mean over prompts of each prompt's mean (standard).

  `weights.per_prompt` multiplies the loss by them, under the name `prompt_weights`; the aggregation is
  `aggregation.token_mean`. A prompt then counts the same however long its completions are, and within
  a prompt every token does.

  Args:
    group_ids: i32[B].
    mask: bool[B, T].

  Returns:
    f32[B, T], 0 outside the mask; their mean over the valid tokens is 1.
  """
  chex.assert_rank(mask, 2)
  chex.assert_shape(group_ids, mask.shape[:1])
  group = same(group_ids)
  tokens = total(jnp.sum(mask, axis=-1, dtype=float), group)
  prompts = jnp.sum((tokens > 0) / size(group))  # each of the k rows of a group counts as 1 / k
  weights = divide(jnp.sum(mask) / jnp.maximum(prompts, 1), tokens)
  return jnp.where(mask, weights[:, None], 0)


def balanced_bounds(
  log_ratio: Array,
  advantages: Array,
  mask: Array,
  *,
  share: float = 0.4,
  low: float = 0.6,
  low_limit: float = 0.9,
  high: float = 1.2,
  high_limit: float = 3.0,
  step_high: float = 0.05,
  step_low: float = 0.02,
  upper_first: bool = True,
) -> Array:
  """Clip bounds that give tokens with A > 0 a given fraction of the loss: BAPO (arXiv:2510.18927).

  While sum_{A > 0} |c| < share * sum |c|, c = min(r A, clip(r, low, high) A), the upper bound is
  raised by one step; once it has reached its limit, the lower bound is raised. The authors' code
  raises the lower bound first (`upper_first=False`). The sums over the batch estimate the paper's
  expectations under the sampling policy. Each update starts again at (low, high).

  Args:
    log_ratio: [B, T], nats.
    advantages: [B, T].
    mask: bool[B, T].
    share: fraction of sum |c| that tokens with A > 0 should reach.
    low: initial lower bound, a ratio.
    low_limit: largest value of the lower bound.
    high: initial upper bound, a ratio.
    high_limit: largest value of the upper bound.
    step_high: step of the upper bound.
    step_low: step of the lower bound. The last step of a bound is shorter if it would pass the limit.
    upper_first: whether the upper bound is raised before the lower one, or after it.

  Returns:
    f32[2], the ratios (low, high); the initial ones if no token is valid.

  Raises:
    ValueError: a limit is infinite or below its initial bound, or a step is not positive.
  """
  chex.assert_equal_shape([log_ratio, advantages, mask])
  if not (low <= low_limit < jnp.inf and high <= high_limit < jnp.inf):
    raise ValueError(
      f'low = {low} <= low_limit = {low_limit} and high = {high} <= high_limit = {high_limit} '
      'must hold, all of them finite'
    )
  if step_high <= 0 or step_low <= 0:
    raise ValueError(f'steps must be positive, got {step_high=} and {step_low=}')
  log_ratio, advantages = (
    jax.lax.stop_gradient(jnp.where(mask, x, 0)) for x in (log_ratio, advantages)
  )
  ratio = jnp.exp(bounded(log_ratio))
  good, bad = jnp.maximum(advantages, 0), jnp.maximum(-advantages, 0)
  # How many steps each bound can take, rounded up. Counting them, not adding them up, avoids rounding.
  raises, lifts = (
    -int(((start - limit) / step + 1e-6) // 1)
    for start, limit, step in ((high, high_limit, step_high), (low, low_limit, step_low))
  )

  # The bounds after a number of steps, of which one bound takes the first.
  def bounds(steps):
    first = jnp.minimum(steps, raises if upper_first else lifts)
    up, lift = (first, steps - first) if upper_first else (steps - first, first)
    moved = low + step_low * lift, high + step_high * up
    return jnp.minimum(jnp.stack(moved), jnp.array([low_limit, high_limit])).astype(ratio.dtype)

  # Whether the fraction of good tokens is still too small and a bound can move.
  def short(steps):
    floor, cap = bounds(steps)
    gain = jnp.sum(good * jnp.minimum(ratio, cap))
    total = gain + jnp.sum(bad * jnp.maximum(ratio, floor))
    return (steps < raises + lifts) & (gain < share * total * (1 - 1e-6))  # allows for rounding

  return bounds(jax.lax.while_loop(short, lambda steps: steps + 1, 0))


def curvature(
  score_norm: Array,
  score_fisher: Array,
  hidden_norm: Array,
  advantages: Array,
  mask: Array,
  *,
  learning_rate: float = 1.5e-5,
  limit_objective: float = 0.01,
  limit_divergence: float = 1e-4,
) -> Array:
  """Tokens to keep: those whose own update changes objective and policy little: CAPO (arXiv:2510.00819).

  The update is modelled as one step of gradient descent on the last layer. A token's gradient is
  G = A v h', so the logits move by eta A |h|^2 v, and to second order

      change of the objective = eta A^2 |v|^2 |h|^2 + eta^2 A^3 |h|^4 (|v|^4 - v'Fv) / 2
      KL of the step          = eta^2 A^2 |h|^4 |v|^4 / 2,  a one-sample estimate.

  A token is kept if the absolute change of the objective and the KL are both below their limits.

  Args:
    score_norm: [B, T], |v|^2 with v = e_token - pi (`logit_stats.score_norm`).
    score_fisher: [B, T], v'Fv with F = diag(pi) - pi pi' (`logit_stats.score_fisher`).
    hidden_norm: [B, T], |h|^2 of the last hidden state (`logit_stats.hidden_norm`).
    advantages: [B, T].
    mask: bool[B, T].
    learning_rate: eta.
    limit_objective: upper limit of the absolute change of the objective, exclusive.
    limit_divergence: upper limit of the KL of the step, nats, exclusive.

  Returns:
    bool[B, T], True where a token is kept.
  """
  chex.assert_equal_shape([score_norm, score_fisher, hidden_norm, advantages, mask])
  move = learning_rate * advantages * hidden_norm  # the logits move by this times v
  along = move * score_norm
  objective = advantages * (along + (along**2 - move**2 * score_fisher) / 2)
  divergence = along**2 / 2
  return mask & (jnp.abs(objective) < limit_objective) & (divergence < limit_divergence)


def _rank(score: Array, among: Array) -> Array:
  """Rank of every entry in increasing order over the whole array, i32[B, T]; entries outside `among`
  come last."""
  order = jnp.argsort(jnp.where(among, score, jnp.inf), axis=None, stable=True)
  rank = jnp.zeros(order.size, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
  return rank.reshape(among.shape)


def _quantile(x: Array, among: Array, share: float) -> Array:
  """The quantile of the entries in `among`, linear between two of them; 0 of none."""
  ordered = jnp.sort(jnp.where(among, x, jnp.inf), axis=None)
  place = share * jnp.maximum(jnp.sum(among) - 1, 0)
  below = ordered[jnp.floor(place).astype(jnp.int32)]
  above = ordered[jnp.ceil(place).astype(jnp.int32)]
  between = jnp.where(above > below, (place - jnp.floor(place)) * (above - below), 0)
  return jnp.where(jnp.any(among), below + between, 0)


def _part(share: float, where: Array) -> Array:
  """int(share n), with n the number of True entries.

  The factor 1 + 1e-6 is for a product that should be a whole number but is rounded down.
  """
  return jnp.floor(share * jnp.sum(where) * (1 + 1e-6)).astype(jnp.int32)


def _covariance(logp: Array, advantages: Array, mask: Array) -> Array:
  """(A - mean A)(log pi - mean log pi) of each valid token."""
  chex.assert_equal_shape([logp, advantages, mask])
  return _centered(logp, mask) * _centered(advantages, mask)


def _centered(x: Array, mask: Array) -> Array:
  """x minus its mean over the valid tokens."""
  x = jnp.where(mask, x, 0)
  return x - jnp.sum(x) / jnp.maximum(jnp.sum(mask), 1)


TABLE = table(
  'selections',
  second_moment,
  second_moment_bounds,
  top_covariance,
  random_covariance,
  unlikely,
  top_entropy,
  uncertain_hints,
  signed_entropy,
  token_band,
  sequence_band,
  geometric_band,
  central_turns,
  self_normalized,
  excess_drift,
  per_prompt,
  balanced_bounds,
  curvature,
)
Part = Annotated[Callable, TABLE]
