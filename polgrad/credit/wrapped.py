"""Estimators that change what another estimator sees, or what it made."""

from collections.abc import Mapping

import jax.numpy as jnp

from polgrad.credit.base import (
  Contrasts,
  Estimator,
  Part,
  check_terms,
  components,
  named,
  to_tokens,
  with_rewards,
)
from polgrad.losses import (
  auxiliary_rewards,
  multipliers,
  pareto,
  returns,
  reward_maps,
  row_scores,
)
from polgrad.losses.groups import divide, first, members, normalized, rank, size, total
from polgrad.registry import AtLeastOne, Count, Decay, Fraction, Positive, call, inputs
from polgrad.types import Array, Batch


def shaped(*, credit: Part, reward: reward_maps.Part) -> Estimator:
  """Another estimator, for which the reward of a row is a function of the rewards of the batch.

  Args:
    credit: the estimator that makes advantages of these rewards.
    reward: arrays by name -> [B]. Rewards of turns are left out, because they add up to the old ones.
  """

  def apply(batch, state):
    return credit.apply(with_rewards(batch, call(reward, batch)), state)

  return credit._replace(
    apply=apply,
    requires=credit.requires | named(reward),
    scored=credit.scored | {'rewards'},
  )


def of_term(*, credit: Part, term: str = '', low: float = 0.0, high: float = 1.0) -> Estimator:
  """Another estimator, for which the reward is clip(x, low, high), with x one term of the reward.

  The success rates of a curriculum are means of the same number if its `term` is the same one and the
  bounds are 0 and 1.

  Args:
    credit: the estimator that sees these rewards.
    term: name of a term that the collector notes (`terms`), before it is weighed; '' is the reward.
    low: least reward.
    high: largest reward.

  Raises:
    ValueError: `low` is not below `high`.
  """
  if not low < high:
    raise ValueError(f'of_term: low must be below high, got {low} and {high}')

  def apply(batch, state):
    x = batch[f'{term}_term'] if term else batch.rewards
    return credit.apply(with_rewards(batch, jnp.clip(x, low, high)), state)

  return credit._replace(
    apply=apply,
    requires=credit.requires | ({f'{term}_term'} if term else set()),
    scored=credit.scored | {'rewards'},
  )


def scored_by(*, credit: Part, anchor: str = 'discriminator') -> Estimator:
  """Another estimator, for which the reward of a row is the score of an anchor's scalar head.

  It is read after the last token of the row, before the anchor learns from the batch. Verifiers are not
  read.

  Args:
    credit: the estimator that makes advantages of these rewards.
    anchor: name of the anchor.
  """
  name = f'{anchor}_head_score'

  def apply(batch, state):
    return credit.apply(with_rewards(batch, jnp.where(batch.valid, batch[name], 0)), state)

  return credit._replace(
    apply=apply, requires=credit.requires | {name}, scored=credit.scored - {'rewards'}
  )


def scaled(*, credit: Part, multiplier: multipliers.Part) -> Estimator:
  """Another estimator, whose advantages are multiplied by a factor for each row or token.

  Args:
    credit: the estimator that makes the advantages.
    multiplier: arrays by name -> [B] or [B, T]; it may read `advantages`, those of the other estimator.

  Raises:
    ValueError: the other estimator makes no advantages.
  """
  _check_makes_advantages('scaled', credit)

  def apply(batch, state):
    credited, state = credit.apply(batch, state)
    factor = call(multiplier, credited)
    factor = factor if factor.ndim == 2 else factor[:, None]
    return credited.with_arrays(advantages=credited.advantages * factor), state

  return credit._replace(
    apply=apply,
    requires=credit.requires | (named(multiplier) - {'advantages'}),
    scored=credit.scored | ({'rewards', 'group_ids'} & {*inputs(multiplier)}),
  )


def token_rewarded(*, credit: Part, rewards: auxiliary_rewards.Part) -> Estimator:
  """Another estimator, to whose advantages the rewards of tokens are added, without a baseline:

      A_t + sum over s >= t of rewards_s

  If the advantages of a row are equal, as those of `outcome`, this is the sum from t on of token rewards
  to whose last one the advantage was added.

  Args:
    credit: the estimator that makes the advantages A.
    rewards: arrays by name -> [B, T], 0 outside the mask.

  Raises:
    ValueError: the other estimator makes no advantages.
  """
  _check_makes_advantages('token_rewarded', credit)

  def apply(batch, state):
    credited, state = credit.apply(batch, state)
    future = returns.reward_to_go(call(rewards, batch), batch.mask)
    return credited.with_arrays(advantages=credited.advantages + future), state

  return credit._replace(apply=apply, requires=credit.requires | named(rewards))


def _check_makes_advantages(name: str, credit: Estimator) -> None:
  if 'advantages' not in credit.provides:
    raise ValueError(
      f'{name}: its credit makes {sorted(credit.provides)}, but it needs one that makes advantages'
    )


def _kept(batch: Batch, score: row_scores.Part, keep: Array | int) -> Array:
  """bool[B]: the `keep` valid rows of each group with the largest scores; `keep` may differ by row."""
  place = rank(-call(score, batch), members(batch.group_ids, batch.valid))
  return batch.valid & (place < keep)


def filtered(*, credit: Part, score: row_scores.Part, keep: AtLeastOne) -> Estimator:
  """Another estimator, which sees of each group only the rows with the largest scores: GFPO
  (arXiv:2508.09726).

  The other rows are in no statistic, and leave the loss and its denominator.

  Args:
    credit: the estimator that credits the rows that are kept.
    score: arrays by name -> [B], such as the negative length.
    keep: number of rows of a group; a group with fewer valid rows keeps all.
  """

  def apply(batch, state):
    kept = _kept(batch, score, keep)
    credited, state = credit.apply(batch.with_arrays(valid=kept), state)
    return credited.with_arrays(mask=credited.mask & kept[:, None]), state

  return credit._replace(
    apply=apply,
    requires=credit.requires | named(score),
    provides=credit.provides | {'mask'},
    scored=credit.scored | {'rewards', 'group_ids'},
  )


def filtered_by_difficulty(
  *,
  credit: Part,
  score: row_scores.Part,
  keeps: tuple = (4, 6, 8, 8),
  capacity: AtLeastOne = 512,
  warmup: Count = 64,
) -> Estimator:
  """`filtered`, with more rows of hard prompts: the adaptive form of GFPO (arXiv:2508.09726).

  The mean rewards of the groups of this and of earlier batches, the last `capacity` of them, are cut at
  their quantiles into as many parts as there are `keeps`. A group keeps the number of its part. A mean
  that equals a quantile is in the harder part.

  Args:
    credit: the estimator that credits the rows that are kept.
    score: arrays by name -> [B], such as the negative length.
    keeps: number of rows that a group keeps, from the easiest part (the largest mean rewards) to the
      hardest. The default ones are those of quartiles.
    capacity: number of groups whose mean rewards are kept.
    warmup: number of groups that must have been seen, those of the batch included; before that all
      groups keep the number of the hardest part.

  Raises:
    ValueError: `keeps` are no whole numbers of at least 1.
  """
  if not keeps or not all(isinstance(k, int) and k >= 1 for k in keeps):
    raise ValueError(
      f'filtered_by_difficulty: keeps must be whole numbers of at least 1, got {keeps}'
    )
  cuts = jnp.arange(1, len(keeps)) / len(keeps)

  def apply(batch, state):
    recent, inner = state['recent'], state['credit']
    group = members(batch.group_ids, batch.valid)
    mean = divide(total(batch.rewards, group), size(group))
    recent = pushed(recent, mean, first(group))
    known = jnp.arange(capacity) < recent['number']
    bounds = jnp.nanquantile(jnp.where(known, recent['means'], jnp.nan), cuts)
    part_of = jnp.sum(mean[:, None] > bounds[None], axis=1)  # 0 is the hardest
    part_of = jnp.where(recent['number'] < max(warmup, 1), 0, part_of)
    kept = _kept(batch, score, jnp.asarray(keeps[::-1])[part_of])
    credited, inner = credit.apply(batch.with_arrays(valid=kept), inner)
    after = {'recent': recent, 'credit': inner}
    return credited.with_arrays(mask=credited.mask & kept[:, None]), after

  return credit._replace(
    apply=apply,
    requires=credit.requires | named(score),
    provides=credit.provides | {'mask'},
    scored=credit.scored | {'rewards', 'group_ids'},
    init=lambda: {
      'recent': {'means': jnp.zeros(capacity), 'number': jnp.zeros((), jnp.int32)},
      'credit': credit.init(),
    },
  )


def pushed(recent: Mapping[str, Array], x: Array, new: Array) -> dict[str, Array]:
  """A window of the last numbers, `means` f[C] of `number` so far, with those of x [B] where `new`.

  They are pushed in their order. Of more than C new ones the last C are kept.
  """
  capacity = len(recent['means'])
  order = jnp.cumsum(new) - 1
  count = jnp.sum(new, dtype=jnp.int32)
  taken = new & (order >= count - capacity)
  place = jnp.where(taken, (recent['number'] + order) % capacity, capacity)
  means = recent['means'].at[place].set(x.astype(recent['means'].dtype), mode='drop')
  return {'means': means, 'number': recent['number'] + count}


def with_success_rate(*, credit: Part, least: float = 1.0) -> Estimator:
  """Another estimator, and the share of right rows of each group as the feature `success_rate`.

  Args:
    credit: the other estimator; its group statistics and this one are of the same rows.
    least: least reward of a right row, in units of the reward.
  """

  def apply(batch, state):
    rate = multipliers.success_rate(batch.rewards, batch.group_ids, batch.valid, least)
    credited, state = credit.apply(batch, state)
    return credited.with_arrays(success_rate=rate), state

  return credit._replace(
    apply=apply,
    provides=credit.provides | {'success_rate'},
    scored=frozenset({'rewards', 'group_ids'}),
  )


def appealed(
  *,
  credit: Part,
  false_positive: Fraction = 0.0,
  checked: Positive = 1.0,
  decay: Decay = 0.95,
  missed: Positive = 0.5,
  accepted: Positive = 4.5,
) -> Estimator:
  """Another estimator, for which rewards are corrected by a rate of false negatives that is measured
  (arXiv:2510.00915).

      R_i = (r_i - false_positive) / (1 - false_positive - q),   q = m / (m + a), at most 0.49

  r is 0 or 1. Of the rows with r = 0 some are appealed: a second, better judge looks at them, and the
  feature `appeal_term` is 1 where it says that the answer is right. m is the decayed number of such
  rows divided by `checked`, and a that of rows with r = 1. Each includes a constant prior count,
  `missed` and `accepted`. q does not depend on the batch that it corrects. False positives are counted
  as right, so they make q smaller than the true rate.

  Args:
    credit: the estimator that sees the corrected rewards. One that divides by the standard deviation of
      a group undoes the correction.
    false_positive: share of wrong answers that the verifier accepts; it must be known.
    checked: share of the rows with r = 0 that are appealed.
    decay: of the counts, per batch.
    missed: prior count of rows that were rejected wrongly.
    accepted: prior count of rows that were accepted.

  Raises:
    ValueError: `false_positive` is 0.5 or more.
  """
  if false_positive >= 0.5:
    raise ValueError(f'appealed: false_positive must be below 0.5, got {false_positive}')

  def apply(batch, state):
    counts, inner = state['counts'], state['credit']
    rate = (counts['missed'] + missed) / (counts['missed'] + counts['accepted'] + missed + accepted)
    rate = jnp.minimum(rate, 0.49)
    corrected = reward_maps.denoised(batch.rewards, false_positive, rate)
    number = lambda rows: jnp.sum(batch.valid & rows)
    seen = {
      'missed': number((batch.rewards < 0.5) & (batch['appeal_term'] > 0)) / checked,
      'accepted': number(batch.rewards >= 0.5),
    }
    # A batch without valid rows says nothing, and nothing is forgotten for it.
    there = jnp.any(batch.valid)
    counts = {k: jnp.where(there, decay * counts[k] + seen[k], counts[k]) for k in counts}
    credited, inner = credit.apply(with_rewards(batch, corrected), inner)
    return credited, {'counts': counts, 'credit': inner}

  return credit._replace(
    apply=apply,
    requires=credit.requires | {'appeal_term'},
    scored=credit.scored | {'rewards'},
    init=lambda: {
      'counts': {'missed': jnp.zeros(()), 'accepted': jnp.zeros(())},
      'credit': credit.init(),
    },
  )


def laddered(*, credit: Part, rungs: tuple, weights: tuple = ()) -> Estimator:
  """Another estimator, for which a term of the reward counts only as far as the terms before it hold:
  the hierarchical reward of RL-Struct (arXiv:2512.00319).

      R = w_1 s_1 + w_2 s_1 s_2 + ... + w_n s_1 ... s_n + s_1 ... s_n r

  s are terms that the collector notes (`terms`), in [0, 1], and r is the reward. An answer that has the
  wrong structure is not rewarded for what it says.

  Args:
    credit: the estimator that sees these rewards.
    rungs: names of the terms, the first one first.
    weights: one for each; () is 1 for all.

  Raises:
    ValueError: no rungs, or another number of weights.
  """
  if not rungs or len(weights) not in (0, len(rungs)):
    raise ValueError(f'laddered: it needs rungs and one weight for each, got {rungs} and {weights}')

  def apply(batch, state):
    reached, total_reward = jnp.ones_like(batch.rewards), 0.0
    for name, weight in zip(rungs, weights or (1.0,) * len(rungs)):
      reached = reached * batch[f'{name}_term']
      total_reward += weight * reached
    return credit.apply(with_rewards(batch, total_reward + reached * batch.rewards), state)

  return credit._replace(
    apply=apply,
    requires=credit.requires | {f'{name}_term' for name in rungs},
    scored=credit.scored | {'rewards'},
  )


def hypervolume_guided(
  *,
  credit: Part,
  terms: Mapping[str, float] = {},
  reference: tuple = (),
  capacity: AtLeastOne = 16,
) -> Estimator:
  """Another estimator, whose rewards count more after the policy has reached a new trade-off between
  several rewards: hypervolume-guided weights (arXiv:2509.11452).

      R_i = (0.5 + 1.5 tanh(V)) r_i

  The policy's place is a vector of means over the valid rows of the batch: of each of the `terms`,
  behind that of the rest of the reward. V is the volume that this place adds to the volume that earlier
  places dominate, measured from the reference. A place that adds something is kept; if there is no
  room, it replaces the oldest one. The factor is 1 until a first place is kept.

  Args:
    credit: the estimator that sees these rewards. One that divides by the standard deviation of a group
      or of the batch does not see the factor.
    terms: weights in the reward of terms that the collector notes (`terms`), by their names.
    reference: the worst values, of the rest of the reward and of each term in alphabetical order; () is
      0 for all.
    capacity: number of places that are kept.

  Raises:
    ValueError: no terms, or another number of references.
  """
  names = sorted(terms)
  if not names or len(reference) not in (0, 1 + len(names)):
    raise ValueError(
      'hypervolume_guided: it needs terms, and a reference for the rest of the reward and for each of '
      f'them; got {dict(terms)} and {reference}'
    )
  corner = reference or (0.0,) * (1 + len(names))

  def apply(batch, state):
    own, inner = state['places'], state['credit']
    values = components(batch, terms).T
    rows = jnp.sum(batch.valid)
    place = jnp.sum(jnp.where(batch.valid[:, None], values, 0), axis=0) / jnp.maximum(rows, 1)
    known = jnp.arange(capacity) < own['number']
    # The last row holds the new place; the gain is the volume with this row less that without it.
    points = jnp.concatenate([own['points'], place[None]])
    among = lambda new: pareto.hypervolume(
      points, jnp.append(known, new), jnp.asarray(corner, points.dtype)
    )
    gain = among(True) - among(False)
    gained = (rows > 0) & (gain > 0)
    factor = jnp.where(own['number'] > 0, 0.5 + 1.5 * jnp.tanh(gain), 1.0)
    at = (jnp.arange(capacity) == own['number'] % capacity)[:, None]
    own = {
      'points': jnp.where(gained & at, place[None], own['points']),
      'number': own['number'] + gained,
    }
    credited, inner = credit.apply(with_rewards(batch, factor * batch.rewards), inner)
    return credited, {'places': own, 'credit': inner}

  return credit._replace(
    apply=apply,
    requires=credit.requires | {f'{name}_term' for name in names},
    scored=credit.scored | {'rewards'},
    init=lambda: {
      'places': {
        'points': jnp.zeros((capacity, len(corner))),
        'number': jnp.zeros((), jnp.int32),
      },
      'credit': credit.init(),
    },
  )


def gradient_guided(
  *,
  credit: Part,
  terms: Mapping[str, float] = {},
  rate: Positive = 0.1,
  parameters: str = '',
  eps: float = 1e-6,
) -> Estimator:
  """Another estimator, whose reward is a weighted sum of several ones, of which those count more whose
  gradients agree with the others: gradient-based weights (arXiv:2509.11452).

      R_i = sum_k w_k x_ik,   log w_k <- log w_k + rate I_k, and then sum_k w_k = 1

  The x_k are the `terms` of the reward, behind the rest of the reward, each before it is weighed. I_k =
  sum_j g_k . g_j (the feature `influences`), with g_k the gradient of the policy's loss if x_k were the
  only reward, normalised within its group (ddof 1). The batch is credited with the weights that its own
  gradients have changed. At first all weights are equal.

  Args:
    credit: the estimator that sees these rewards.
    terms: weights in the reward of terms that the collector notes (`terms`), by their names.
    rate: change of log w per unit of I; the authors divide the learning rate, 1e-6, by 1e-5.
    parameters: regular expression that finds the names of the parameters whose gradients are compared,
      such as 'unembed'; '' compares all, which holds a gradient for each reward in memory.
    eps: added to the standard deviations, in units of each reward.

  Raises:
    ValueError: no terms.
  """
  names = check_terms('gradient_guided', terms)
  count = 1 + len(names)

  def contrasts(batch):
    group = members(batch.group_ids, batch.valid)
    return jnp.stack(
      [to_tokens(normalized(x, group, 1, eps), batch.mask) for x in components(batch, terms)]
    )

  def apply(batch, state):
    # Every row repeats the numbers of the batch; a batch without valid rows has no gradients.
    influence = jnp.where(jnp.any(batch.valid), batch['influences'][0], 0.0)
    log_weights = pareto.influence_weights(state['log_weights'], influence, rate=rate)
    mixed = jnp.exp(log_weights) @ components(batch, terms)
    credited, inner = credit.apply(with_rewards(batch, mixed), state['credit'])
    return credited, {'log_weights': log_weights, 'credit': inner}

  return credit._replace(
    apply=apply,
    requires=credit.requires | {'influences', *(f'{name}_term' for name in names)},
    scored=frozenset({'rewards', 'group_ids'}),
    init=lambda: {'log_weights': jnp.full(count, -jnp.log(count)), 'credit': credit.init()},
    contrasts=Contrasts(contrasts, parameters),
  )


def decomposed(*, credit: Part, terms: tuple, lows: tuple = (), highs: tuple = ()) -> Estimator:
  """Another estimator, applied to each term of the reward by itself: the advantages are averaged
  (advantage decomposition, BNPO, arXiv:2506.02864).

      A = 1/K sum_k A(x_k),   x_k = (term_k - low_k) / (high_k - low_k)

  So what the other estimator fits to the batch, such as a deviation or a density, is of each term, and
  the weights of the terms in the reward do not matter.

  Args:
    credit: the estimator that sees one term at a time as the reward; it makes advantages alone.
    terms: names of K terms that the collector notes (`terms`), before they are weighed.
    lows: K least values, which become 0; () leaves the terms unchanged.
    highs: K largest values, which become 1; () leaves the terms unchanged.

  Raises:
    ValueError: no terms, other numbers of bounds, a low that is not below its high, or an estimator that
      makes something else.
  """
  if not terms or len(lows) not in (0, len(terms)) or len(highs) != len(lows):
    raise ValueError(
      f'decomposed: it needs terms, and one low and one high for each or none; got {terms}, lows={lows} '
      f'and highs={highs}'
    )
  if not all(low < high for low, high in zip(lows, highs)):
    raise ValueError(f'decomposed: each low must be below its high, got lows={lows}, highs={highs}')
  if credit.provides != {'advantages'}:
    raise ValueError(
      f'decomposed: its credit makes {sorted(credit.provides)}, but it needs one that makes advantages '
      'alone'
    )
  bounds = [*zip(lows, highs)] or [(0.0, 1.0)] * len(terms)

  def apply(batch, states):
    total, after = 0.0, []
    for name, (low, high), state in zip(terms, bounds, states):
      x = jnp.where(batch.valid, (batch[f'{name}_term'] - low) / (high - low), 0)
      credited, state = credit.apply(with_rewards(batch, x), state)
      total += credited.advantages
      after.append(state)
    return batch.with_arrays(advantages=total / len(terms)), tuple(after)

  return credit._replace(
    apply=apply,
    requires=credit.requires | {f'{name}_term' for name in terms},
    init=lambda: tuple(credit.init() for _ in terms),
  )
