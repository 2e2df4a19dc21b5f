"""Comparisons of the preference pairs of a whole batch, such as ranks.

A function of `TABLE` fills one of the `selections` of `objectives.Pairwise`; scores, shapes, offsets and
weights read the result by its name in the configuration. It is evaluated once per update on the whole
minibatch, before that is split into micro-batches, and no gradient flows through it. It returns one
number a pair, [B / 2], which its readers get as [B], the same in both rows; or one entry a token,
[B, T]; any other shape is one value of the whole batch. Pairs of which a row has no tokens
(`pairs.complete` is False) should not influence the result of the other pairs.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.losses import implicit_rewards, pairs
from polgrad.losses._common import gumbel
from polgrad.losses.groups import divide, everyone, rank
from polgrad.reductions import Deviation
from polgrad.registry import Count, Fraction, Positive, table
from polgrad.types import Array


def largest_gaps(
  gap: Array,
  previous_logp: Array,
  reference_logp: Array,
  preferred: Array,
  mask: Array,
  step: Array,
  *,
  fraction: Fraction = 0.7,
  ensemble: Fraction = 0.5,
  begin: Count = 0,
) -> Array:
  """The pairs with the largest implicit reward margins: SeRA (arXiv:2410.09362).

  The margin is ensemble h(policy) + (1 - ensemble) h(previous), where h is the difference of the pair's
  summed log-ratios to the reference. Pairs with a wrong label tend to have small margins.

  Args:
    gap: [B], h of the policy, the same in both rows of a pair.
    previous_logp: [B, T], nats, of an earlier policy.
    reference_logp: [B, T], nats.
    preferred: bool[B], one True in each pair.
    mask: bool[B, T].
    step: [], updates so far.
    fraction: of the pairs; their number is rounded up. Of equal margins the first pairs are kept.
    ensemble: weight of the policy's own margin.
    begin: updates before which all pairs are kept.

  Returns:
    f32[B / 2], (pairs) / (kept pairs) for the kept ones and 0 for the others.
  """
  earlier = implicit_rewards.log_ratio_sum(previous_logp, reference_logp, mask)
  chosen, rejected = pairs.split(earlier, preferred)
  margin = ensemble * pairs.first(gap) + (1 - ensemble) * (chosen - rejected)
  where = pairs.complete(mask)
  number = jnp.ceil(fraction * jnp.sum(where) * (1 - 1e-6))  # the factor makes up for rounding
  best = where & (rank(-margin, everyone(where)) < number)
  return _factors(jnp.where(step < begin, where, best), where)


def near_average(
  gap: Array,
  mask: Array,
  noise: Array,
  gap_average: Array,
  step: Array,
  *,
  dropped: Fraction = 0.2,
  decay: Fraction = 0.9,
  correct_bias: bool = False,
) -> Array:
  """Pairs drawn by how near their margin is to its moving average: the filter of beta-DPO
  (arXiv:2407.08639).

  First the averages are updated with the mean and the standard deviation of this batch,
  M <- decay M + (1 - decay) mean h and S likewise. Then (1 - dropped) of the pairs are drawn without
  replacement with probabilities proportional to exp(-((h - M) / S)^2 / 2).

  Args:
    gap: [B], h, the same in both rows of a pair.
    mask: bool[B, T].
    noise: [B, T], uniform random numbers in [0, 1).
    gap_average: [2], M and S before this update (`metric_history.average`).
    step: [], updates so far.
    dropped: fraction of pairs that are left out; the number of those that are drawn is rounded down, but
      is at least 1.
    decay: of the averages; the same as in the history.
    correct_bias: divide M and S by 1 - decay^(updates). They begin at 0, so without this the first
      batches keep the pairs whose margin is near 0.

  Returns:
    f32[B / 2], (pairs) / (drawn pairs) for the drawn ones and 0 for the others.
  """
  drawn, _ = _near_average(gap, mask, noise, gap_average, step, dropped, decay, correct_bias)
  return _factors(drawn, pairs.complete(mask))


def adaptive_beta(
  gap: Array,
  mask: Array,
  noise: Array,
  gap_average: Array,
  step: Array,
  *,
  beta: Positive = 0.1,
  rate: float = 0.6,
  least: Positive = 1e-3,
  dropped: Fraction = 0.2,
  decay: Fraction = 0.9,
  correct_bias: bool = False,
) -> Array:
  """max(least, beta (1 + rate (mean h of the drawn pairs - M))): the beta of a batch in beta-DPO
  (arXiv:2407.08639).

  Arguments as in `near_average`, which draws the same pairs from the same noise.

  Args:
    gap: [B].
    mask: bool[B, T].
    noise: [B, T].
    gap_average: [2].
    step: [].
    beta: at a batch whose margins are the average.
    rate: relative change of beta for each nat above the average.
    least: smallest beta.
    dropped: that of `near_average`.
    decay: that of `near_average`.
    correct_bias: that of `near_average`.

  Returns:
    f32[].
  """
  drawn, center = _near_average(gap, mask, noise, gap_average, step, dropped, decay, correct_bias)
  mean = divide(jnp.sum(jnp.where(drawn, pairs.first(gap), 0)), jnp.sum(drawn))
  return jnp.maximum(least, beta * (1 + rate * (mean - center)))


def shortened(noise: Array, mask: Array, *, again: bool = False) -> Array:
  """m tokens of each row, drawn without replacement, m the length of the shorter row of the pair: SamPO
  (arXiv:2406.10957).

  Args:
    noise: [B, T], uniform random numbers in [0, 1).
    mask: bool[B, T].
    again: whether to draw another subset, independent of the first one.

  Returns:
    bool[B, T]; all tokens of the shorter row.
  """
  if again:
    # The first number is a seed: a function of the update alone, as all noise is.
    seed = jnp.floor(noise[0, 0] * 2**23).astype(jnp.int32)
    noise = jax.random.uniform(jax.random.key(seed), mask.shape)
  order = jnp.argsort(jnp.where(mask, noise, jnp.inf), axis=1)
  place = jnp.argsort(order, axis=1)  # of every token in the order of its row's numbers
  return mask & (place < pairs.shared_length(mask)[:, None])


def sorted_reference(logp: Array, reference_logp: Array, preferred: Array, mask: Array) -> Array:
  """n_(k) - n: the reference margin of the rank of the pair's policy margin less its own, for AOT
  (arXiv:2406.05882).

  m = log pi(w) - log pi(l) and n = log ref(w) - log ref(l) are margins of a pair. AOT sorts the margins
  of all pairs, m and n each by themselves, and compares them rank by rank: a pair whose m has rank k is
  compared with n_(k). Its DPO margin h = m - n therefore becomes h - (n_(k) - n). The reference is a
  constant and ranks have no gradient, so the gradient passes through m alone, as in the sorted loss.

  Args:
    logp: [B, T], nats.
    reference_logp: [B, T], nats.
    preferred: bool[B], one True in each pair.
    mask: bool[B, T].

  Returns:
    [B / 2], nats; 0 for a pair of which a row has no tokens.
  """
  where = pairs.complete(mask)
  margin = lambda x: jnp.subtract(*pairs.split(implicit_rewards.logp_sum(x, mask), preferred))
  own = margin(reference_logp)
  matched = jnp.sort(jnp.where(where, own, jnp.inf))[rank(margin(logp), everyone(where))]
  return jnp.where(where, matched - own, 0)


def _near_average(
  gap: Array,
  mask: Array,
  noise: Array,
  gap_average: Array,
  step: Array,
  dropped: float,
  decay: float,
  correct_bias: bool,
) -> tuple[Array, Array]:
  """The drawn pairs, bool[B / 2], and the updated average M; see `near_average`."""
  where, margin = pairs.complete(mask), pairs.first(gap)
  now = [Deviation.of(margin, where).mean(), Deviation.of(margin, where).value()]
  average = decay * gap_average + (1 - decay) * jnp.stack(now)
  if correct_bias:
    average = average / (1 - decay ** (step + 1))
  center, width = average
  distance = divide(margin - center, width)
  keys = -jnp.square(distance) / 2 + gumbel(noise[::2, 0])
  # 1 + 1e-6 makes up for rounding: 0.8 * 5 pairs must not become 3.9999998, which is rounded down to 3.
  number = jnp.maximum(jnp.floor((1 - dropped) * jnp.sum(where) * (1 + 1e-6)), 1)
  drawn = where & (rank(-keys, everyone(where)) < number)
  return drawn, center


def _factors(kept: Array, where: Array) -> Array:
  """(pairs) / (kept pairs) for the kept ones, 0 for the others: two of bool[n] -> f32[n]."""
  return jnp.where(kept, divide(jnp.sum(where, dtype=jnp.float32), jnp.sum(kept)), 0)


TABLE = table(
  'pair_selections', largest_gaps, near_average, adaptive_beta, shortened, sorted_reference
)
Part = Annotated[Callable, TABLE]
