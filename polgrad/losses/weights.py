"""Detached weights that multiply the token loss: importance weights and trust-region masks.

A function of `TABLE` fills one of the `weights` of `objectives.PolicyGradient`; `TABLE` includes the
functions of `trust_region_masks`. In formulas, rho = pi_proximal / pi_behavior is the ratio between the
trainer's policy at the start of the phase and the distribution that the sampler really used (which
differs by other kernels, lower precision or older parameters), r = exp(log_ratio) is the ratio between
the live policy and the proximal one, and sg is stop_gradient. Log-ratios are clamped to +-20 nats.
Bounds are ratios themselves, not distances from 1.

A token of weight 0 still counts in the denominator of the aggregation. Weights multiply the loss, not
the reward, because normalising the advantages would undo a factor of the reward.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import _common
from polgrad.losses._common import geometric_ratio, row_ratio, token_ratio, truncate, within
from polgrad.losses.trust_region_masks import (
  geometric_band,
  near_behavior_or_positive,
  near_or_positive,
  one_sided,
  probability_one_sided,
  ring,
  selected,
  two_sided,
  unselected,
)
from polgrad.registry import AtLeastOne, Count, Fraction, NotNegative, table
from polgrad.types import Array


def truncated_importance(
  proximal_logp: Array, behavior_logp: Array, *, cap: float = 2.0, floor: float = 0.0
) -> Array:
  """sg(clip(rho, floor, cap)): truncated importance sampling, per token (Yao et al. 2025, "Your
  Efficient RL Framework Secretly Brings You Off-Policy RL Training"; idea: arXiv:2505.24034).

  Without a floor, truncation only makes weights smaller, so E_behavior[min(rho, cap)] <= 1. An infinite
  cap gives the weight of decoupled PPO (arXiv:2505.24298). With a floor, tokens that the sampler
  overrates keep at least that weight.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    cap: largest weight.
    floor: smallest weight.

  Returns:
    [..., T], in [floor, cap].

  Raises:
    ValueError: a floor outside [0, cap].
  """
  return truncate(token_ratio(proximal_logp, behavior_logp), floor, cap)


def masked_importance(
  proximal_logp: Array, behavior_logp: Array, *, low: float = 0.5, high: float = 5.0
) -> Array:
  """sg(rho 1[low <= rho <= high]): IcePop (arXiv:2510.18855).

  A token outside the band is dropped, not truncated; a token exactly on a bound is kept.
  `low=0, high=inf` gives the full importance weight.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    low: smallest ratio that is kept.
    high: largest ratio that is kept.

  Returns:
    [..., T].
  """
  ratio = token_ratio(proximal_logp, behavior_logp)
  return jnp.where(within(ratio, low, high), ratio, 0)


def truncated_sequence_importance(
  proximal_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  cap: float = 2.0,
  floor: float = 0.0,
) -> Array:
  """sg(clip(prod_t rho_t, floor, cap)) at every token: truncated importance sampling of rows (standard).

  With an infinite cap and r = 1 the sequence-level gradient is unbiased (as long as the clamp to 20
  nats is not active), but its variance grows exponentially with the length. The cap limits it.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    cap: largest weight.
    floor: smallest weight.

  Returns:
    [..., T], the same in all tokens of a row; clip(1, floor, cap) in a row without tokens.

  Raises:
    ValueError: a floor outside [0, cap].
  """
  ratio = row_ratio(proximal_logp, behavior_logp, mask)
  return jnp.broadcast_to(truncate(ratio, floor, cap), mask.shape)


def truncated_geometric_importance(
  proximal_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  cap: float = 2.0,
  floor: float = 0.0,
) -> Array:
  """sg(clip((prod_t rho_t)^(1/L), floor, cap)) at every token of a row of L tokens (standard).

  The geometric mean does not grow with the length, so one cap suits short and long rows. It is not the
  importance weight of the row, so the gradient stays biased, also with an infinite cap.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    cap: largest weight.
    floor: smallest weight.

  Returns:
    [..., T], the same in all tokens of a row; clip(1, floor, cap) in a row without tokens.

  Raises:
    ValueError: a floor outside [0, cap].
  """
  ratio = geometric_ratio(proximal_logp, behavior_logp, mask)
  return jnp.broadcast_to(truncate(ratio, floor, cap), mask.shape)


def masked_sequence_importance(
  proximal_logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  low: float = 0.0,
  high: float = 3.0,
) -> Array:
  """sg(R 1[low <= R <= high]), R = prod_t rho_t, at every token: IcePop for whole rows
  (arXiv:2510.18855).

  Whole rows are dropped because a token sampled from a very different distribution also changes the
  prefix of all later tokens.

  Args:
    proximal_logp: [..., T], nats.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    low: smallest ratio of a row that is kept.
    high: largest ratio of a row that is kept.

  Returns:
    [..., T], the same in all tokens of a row.
  """
  ratio = row_ratio(proximal_logp, behavior_logp, mask)
  return jnp.broadcast_to(jnp.where(within(ratio, low, high), ratio, 0), mask.shape)


def tapered(
  log_ratio: Array,
  rewards: Array,
  *,
  positive_low: float = 1.0,
  positive_high: float = 1.0,
  negative_low: float = 0.0,
  negative_high: float = 1.0,
  threshold: float = 0.0,
) -> Array:
  """sg(clip(r, low, high)), bounds by the sign of the reward: TOPR (arXiv:2503.14286).

  By default good rows have the weight 1, as in supervised learning, and bad rows the weight min(r, 1):
  the less likely a bad row has become, the less it is pushed down. Bounds of (0, inf) for both signs
  give importance sampling, bounds of (1, 1) give plain REINFORCE. The paper uses the ratio of the row
  (`ratios.sequence_product`); Trinity-RFT uses that of tokens, which is a different algorithm.

  Args:
    log_ratio: [B, T], nats; detached here.
    rewards: f32[B].
    positive_low: smallest weight of a good row.
    positive_high: largest weight of a good row.
    negative_low: smallest weight of a bad row.
    negative_high: largest weight of a bad row.
    threshold: a row is good if its reward exceeds this, otherwise bad.

  Returns:
    [B, T].
  """
  chex.assert_rank(log_ratio, 2)
  chex.assert_shape(rewards, log_ratio.shape[:1])
  ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
  good = (rewards > threshold)[:, None]
  positive = jnp.clip(ratio, positive_low, positive_high)
  return jnp.where(good, positive, jnp.clip(ratio, negative_low, negative_high))


def gamma_shaped(
  log_ratio: Array,
  advantages: Array,
  *,
  power_positive: float = 2.0,
  rate_positive: float = 3.0,
  power_negative: float = 3.0,
  rate_negative: float = 2.0,
) -> Array:
  """sg(r^k exp(rate (1 - r))), (k, rate) by the sign of A: VESPO (arXiv:2602.10693).

  The weight is 1 on-policy, has its maximum at r = k / rate, and decays on both sides of it, so tokens
  far from the current policy in either direction have a small weight. The paper uses the ratio of the
  row (`ratios.sequence_product`).

  Args:
    log_ratio: [..., T], nats; detached here.
    advantages: [..., T]; only the sign is read.
    power_positive: k where A >= 0.
    rate_positive: rate where A >= 0.
    power_negative: k where A < 0.
    rate_negative: rate where A < 0.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([log_ratio, advantages])
  log_ratio = jax.lax.stop_gradient(log_ratio)
  power = jnp.where(advantages >= 0, power_positive, power_negative)
  rate = jnp.where(advantages >= 0, rate_positive, rate_negative)
  return jnp.exp(power * log_ratio - rate * jnp.expm1(log_ratio)).astype(log_ratio.dtype)


def soft_gate(
  log_ratio: Array,
  advantages: Array,
  *,
  tau_positive: float = 1.0,
  tau_negative: float = 1.05,
) -> Array:
  """sg((4 / tau) sigmoid(tau (r - 1))): the gate of SAPO (arXiv:2511.20347) as a constant.

  With `surrogates.reinforce` the gradient weight of log pi is gate * A. If the gate carries gradient
  (`surrogates.soft_gated`) it is r A times the gate's slope. On-policy the first is 2 / tau times the
  second.

  Args:
    log_ratio: [..., T], nats.
    advantages: [..., T]; only the sign is read.
    tau_positive: steepness of the gate where A > 0.
    tau_negative: steepness of the gate where A <= 0.

  Returns:
    [..., T].

  Raises:
    ValueError: tau_positive <= 0 or tau_negative <= 0.
  """
  chex.assert_equal_shape([log_ratio, advantages])
  ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
  return _common.soft_gate(ratio, advantages, tau_positive, tau_negative)


def normalized(normalized_weights: Array) -> Array:
  """The importance weights that the selection `normalized_weights` has divided by their mean over the
  batch, see `selections.self_normalized` (standard).

  Args:
    normalized_weights: [B, T].

  Returns:
    [B, T].
  """
  return jax.lax.stop_gradient(normalized_weights)


def per_prompt(prompt_weights: Array) -> Array:
  """The weights with which a mean over tokens is a mean over prompts, see `selections.per_prompt`
  (standard).

  Args:
    prompt_weights: [B, T].

  Returns:
    [B, T].
  """
  return jax.lax.stop_gradient(prompt_weights)


def replayed(replay_weight: Array, mask: Array) -> Array:
  """The importance weight of a row that was drawn again by its priority, 1 for other rows: prioritised
  replay (arXiv:1511.05952), see `collect.Rollouts.replay_correction`.

  Args:
    replay_weight: [B].
    mask: bool[B, T].

  Returns:
    [B, T], the same in all tokens of a row.
  """
  chex.assert_rank([replay_weight, mask], [1, 2])
  chex.assert_equal_shape_prefix([replay_weight, mask], 1)
  return jax.lax.stop_gradient(jnp.broadcast_to(replay_weight[:, None], mask.shape))


def fresh(token_staleness: Array, mask: Array, *, oldest: Count = 1) -> Array:
  """1[token_staleness <= oldest]: tokens that were drawn by older weights leave the loss (standard).

  For rows that continue over updates, see `collect.Rollouts.in_flight`: their first tokens are the
  oldest.

  Args:
    token_staleness: f32[B, T], batches used for training since the weights that drew the token.
    mask: bool[B, T].
    oldest: the largest age of a token that is kept.

  Returns:
    f32[B, T], 1 outside the mask.
  """
  chex.assert_equal_shape([token_staleness, mask])
  return jnp.where(mask & (token_staleness > oldest), 0.0, 1.0)


def probability(logp: Array, *, exponent: NotNegative = 1.0, floor: Fraction = 0.0) -> Array:
  """sg(max(p, floor)^exponent) with p = exp(logp), the probability of the token: DFT (arXiv:2508.05629).

  With the loss -logp the gradient is that of -p^exponent / exponent. Below 1, tokens with frequencies q
  are learned with probabilities proportional to q^(1 / (1 - exponent)): 0 is the likelihood, and more
  sharpens. At 1, which is DFT, only the most frequent token is left. With a floor, which is 0.1 in the
  authors' variant for rewards, tokens below it are learned as by the likelihood times the floor.

  Args:
    logp: [..., T], nats; detached here.
    exponent: of the probability.
    floor: least probability of the weight, not of the loss.

  Returns:
    [..., T], in [0, 1].
  """
  weight = jnp.exp(exponent * jax.lax.stop_gradient(logp))
  return jnp.maximum(weight, floor**exponent)


def undecided(logp: Array) -> Array:
  """sg(p (1 - p)) with p = exp(logp): the weight phi of CHORD (arXiv:2508.11408).

  It is largest at p = 1/2. Tokens that the policy knows, and tokens that it finds impossible, are not
  learned.

  Args:
    logp: [..., T], nats; detached here.

  Returns:
    [..., T], in [0, 1/4].
  """
  p = probability(logp)
  return p * (1 - p)


def repeated_ngram(tokens: Array, mask: Array, *, n: AtLeastOne = 4) -> Array:
  """1 for tokens inside an n-gram that the completion has had before, else 0 (arXiv:1908.04319).

  n-grams are of consecutive tokens of the mask. The first occurrence is free; occurrences may overlap.

  Args:
    tokens: i32[B, T].
    mask: bool[B, T].
    n: tokens of an n-gram.

  Returns:
    [B, T].
  """
  chex.assert_rank([tokens, mask], 2)
  chex.assert_equal_shape([tokens, mask])
  length = tokens.shape[1]
  shifted = lambda x, i: jnp.pad(x[:, i:], ((0, 0), (0, i)))
  # same[b, j, k]: the n-grams that begin at j and at k are equal, and all of their tokens in the mask.
  same = jnp.ones((*tokens.shape, length), bool)
  for i in range(n):
    own, inside = shifted(tokens, i), shifted(mask, i)
    same &= (own[:, :, None] == own[:, None]) & inside[:, :, None] & inside[:, None]
  repeats = jnp.any(same & jnp.tri(length, k=-1, dtype=bool)[None], axis=2)
  # An n-gram that is repeated at j covers j, ..., j + n - 1.
  covered = [jnp.pad(repeats, ((0, 0), (i, 0)))[:, :length] for i in range(n)]
  return jnp.where(jnp.any(jnp.stack(covered), axis=0), 1.0, 0.0)


def row_entropy(
  entropy: Array, mask: Array, *, scale: float = 0.5, exponent: float = -1.0
) -> Array:
  """sg(scale exp(exponent H)), H the mean entropy of the row's tokens: SRFT (arXiv:2506.19767).

  With a negative exponent, demonstrations of which the policy is unsure weigh less.

  Args:
    entropy: [..., T], nats.
    mask: bool[..., T].
    scale: weight of a row without entropy.
    exponent: of a nat.

  Returns:
    [..., T], the same in all tokens of a row.
  """
  chex.assert_equal_shape([entropy, mask])
  mean = _common.row_mean(jax.lax.stop_gradient(entropy), mask)
  return jnp.broadcast_to(scale * jnp.exp(_common.bounded(exponent * mean)), mask.shape)


def positive_row_entropy(
  entropy: Array, advantages: Array, mask: Array, *, scale: float = 0.1, exponent: float = 1.0
) -> Array:
  """`row_entropy` where A > 0, and 1 elsewhere: SRFT (arXiv:2506.19767).

  With a positive exponent, right samples of which the policy is unsure weigh more.

  Args:
    entropy: [..., T], nats.
    advantages: [..., T].
    mask: bool[..., T].
    scale: weight of a row without entropy.
    exponent: of a nat.

  Returns:
    [..., T].
  """
  chex.assert_equal_shape([entropy, advantages, mask])
  weight = row_entropy(entropy, mask, scale=scale, exponent=exponent)
  return jnp.where(advantages > 0, weight, jnp.ones_like(weight))


def suffix_importance(
  logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  block: int = 1,
  decay: float = 0.999,
  shift_low: float = -0.08,
  shift_high: float = 0.3,
  low: float = 0.1,
  high: float = 10.0,
) -> Array:
  """sg(clip(decay^(n - e) exp(sum_{j > e} delta_j), low, high)): how likely the policy is to finish the
  row as the data do, PEAR (arXiv:2602.01058).

  delta = clip(logp - behavior_logp, shift_low, shift_high), n is the number of tokens of the row, and e
  the last token of the block that the token is in. Blocks are counted over the tokens of the mask, from
  the first. A block that holds the whole row gives the weight 1. Without bounds and with decay 1, the
  expected weight after any prefix is 1 on data that were not filtered. On data filtered to successes,
  it is in proportion to the probability that the policy succeeds from there.

  Args:
    logp: [..., T], nats; detached here.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    block: number of tokens of a block.
    decay: factor for each token after the block.
    shift_low: smallest log-ratio of a token, nats.
    shift_high: largest log-ratio of a token, nats.
    low: smallest weight.
    high: largest weight.

  Returns:
    [..., T], in [low, high]; 1 outside of the mask.

  Raises:
    ValueError: block < 1, or a low outside [0, high].
  """
  if block < 1:
    raise ValueError(f'block must be at least 1 token, got {block}')
  delta = _shift(logp, behavior_logp, mask, shift_low, shift_high)
  index = jnp.cumsum(mask, axis=-1)  # from 1
  count = index[..., -1:]
  end = jnp.minimum(-(-index // block) * block, count)
  later = index[..., None, :] > end[..., :, None]
  rest = jnp.sum(jnp.where(later, delta[..., None, :], 0), axis=-1)
  rest = rest + (count - end) * jnp.log(decay)
  return jnp.where(mask, truncate(jnp.exp(_common.bounded(rest)), low, high), 1)


def row_importance(
  logp: Array,
  behavior_logp: Array,
  mask: Array,
  *,
  shift_low: float = -0.08,
  shift_high: float = 0.3,
  low: float = 0.1,
  high: float = 10.0,
) -> Array:
  """sg(clip(exp(sum_t delta_t), low, high)) at every token: PEAR per sequence (arXiv:2602.01058).

  delta = clip(logp - behavior_logp, shift_low, shift_high). Without bounds it is the importance weight
  of the row against the policy that wrote the data.

  Args:
    logp: [..., T], nats; detached here.
    behavior_logp: [..., T], nats.
    mask: bool[..., T].
    shift_low: smallest log-ratio of a token, nats.
    shift_high: largest log-ratio of a token, nats.
    low: smallest weight.
    high: largest weight.

  Returns:
    [..., T], the same in all tokens of a row.

  Raises:
    ValueError: a low outside [0, high].
  """
  delta = _shift(logp, behavior_logp, mask, shift_low, shift_high)
  total = _common.bounded(jnp.sum(delta, axis=-1, keepdims=True))
  return jnp.broadcast_to(truncate(jnp.exp(total), low, high), mask.shape)


def _shift(logp: Array, other: Array, mask: Array, low: float, high: float) -> Array:
  """Log-ratios to the policy that wrote the data, clipped, 0 outside of the mask; detached."""
  chex.assert_equal_shape([logp, other, mask])
  return jnp.where(
    mask, jnp.clip(jax.lax.stop_gradient(_common.single(logp - other)), low, high), 0
  )


TABLE = table(
  'weights',
  truncated_importance,
  masked_importance,
  truncated_sequence_importance,
  masked_sequence_importance,
  truncated_geometric_importance,
  tapered,
  gamma_shaped,
  soft_gate,
  normalized,
  per_prompt,
  replayed,
  fresh,
  probability,
  undecided,
  repeated_ngram,
  row_entropy,
  positive_row_entropy,
  suffix_importance,
  row_importance,
) | table(
  'trust_region_masks',
  geometric_band,
  one_sided,
  two_sided,
  ring,
  probability_one_sided,
  near_or_positive,
  near_behavior_or_positive,
  selected,
  unselected,
)
Part = Annotated[Callable, TABLE]
