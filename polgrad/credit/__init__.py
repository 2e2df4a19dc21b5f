"""Credit: from rewards to the advantages, returns or labels that an objective reads.

An `Estimator` applies the pure functions of `losses` to a whole collected batch. It runs once, before
minibatches are cut, so statistics of groups and of the batch are those of all rows. Its results are
data: no gradient flows through them. `assign` runs an estimator."""

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from polgrad.arrays import per_token
from polgrad.credit.base import (
  TABLE,
  Estimator,
  Part,
  average,
  averaged,
  averages,
  critic,
  k1,
  kl_requires,
  log_rho,
  mean_wins,
  named,
  to_tokens,
  token_rewards,
  valid_groups,
  with_rewards,
  with_targets,
)
from polgrad.credit.bootstrap import bootstrapped_pairs
from polgrad.credit.levels import modes, two_level
from polgrad.credit.tokens import (
  conflict_aware,
  decoupled,
  hybrid,
  implicit_process,
  process_min,
  spans_generalized,
  weighed_by_network,
)
from polgrad.credit.trees import step_values, tree_values
from polgrad.credit.turns import (
  bilevel_generalized,
  discounted_outcome,
  entropy_modulated,
  gigpo,
  self_correction,
  self_play,
  turn_generalized,
  turn_returns,
)
from polgrad.credit.wrapped import (
  appealed,
  decomposed,
  filtered,
  filtered_by_difficulty,
  gradient_guided,
  hypervolume_guided,
  laddered,
  of_term,
  scaled,
  scored_by,
  shaped,
  token_rewarded,
  with_success_rate,
)
from polgrad.losses import advantages as advantage_functions
from polgrad.losses import best_of_n as best_of_n_rewards
from polgrad.losses import down_sampling, f_divergences, log_partition, returns
from polgrad.losses import reward_penalties as cost_functions
from polgrad.losses.advantages import NormalizerPart, group_mean, identity, whiten
from polgrad.losses.baselines import optimal_token_baseline
from polgrad.losses.groups import (
  Groups,
  at_most,
  first_best,
  kendall_tau,
  maximum,
  members,
  minimum,
  rank,
  same,
  size,
  total,
)
from polgrad.registry import (
  AtLeastOne,
  Fraction,
  NotNegative,
  Positive,
  Range,
  call,
  check_weighted,
  table,
)
from polgrad.types import STREAMS, Array, Batch


def nothing() -> Estimator:
  """No credit: for objectives that read only the data (supervised, distillation)."""
  return Estimator(apply=lambda batch, state: (batch, state), provides=frozenset())


def outcome(
  *,
  advantage: advantage_functions.Part = group_mean,
  normalizer: NormalizerPart = identity,
  kl_coefficient: float = 0.0,
  costs: Mapping[str, cost_functions.Part] = {},
) -> Estimator:
  """One advantage per sequence, which each of its tokens gets.

  A = advantage(R - kl_coefficient * sum_t k1_t - sum_k coefficient_k * cost_k), with
  k1 = proximal_logp - reference_logp: a KL penalty in the reward has the gradient of
  KL(policy, reference) (arXiv:2402.14740). `costs` are other functions of sum_t k1_t.
  """
  check_weighted('costs', costs)

  def apply(batch, state):
    penalized = batch
    if kl_coefficient or costs:
      log_ratio_sum = jnp.sum(k1(batch), axis=1)
      penalized = batch.with_arrays(log_ratio_sum=log_ratio_sum)
      penalty = kl_coefficient * log_ratio_sum
      penalty += sum(one.weight * call(one.fn, penalized) for one in costs.values())
      penalized = penalized.with_arrays(rewards=batch.rewards - penalty)
    advantages = to_tokens(call(advantage, penalized), batch.mask)
    return batch.with_arrays(advantages=normalizer(advantages, batch.mask)), state

  return Estimator(
    apply=apply, requires=kl_requires(kl_coefficient or len(costs)) | named(advantage)
  )


def reward_to_go(
  *,
  discount: float = 1.0,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
  anchors: Mapping[str, float] = {},
) -> Estimator:
  """A_t = sum over k >= t of discount^(k - t) (r_k - kl_coefficient * k1_k), normalised.

  With whitening over the batch's tokens this is REINFORCE++ (arXiv:2501.03262). A KL penalty to go
  credits a token with its effect on later ones, which no loss of single tokens does.

  Args:
    discount: of rewards, per token.
    normalizer: of the advantages.
    kl_coefficient: of k1 = log pi - log reference, nats.
    anchors: coefficients of the same penalty against further anchors, by their names.
  """

  def apply(batch, state):
    rewards = token_rewards(batch, kl_coefficient)
    for name, coefficient in anchors.items():
      rewards = rewards - coefficient * k1(batch, f'{name}_logp')
    future = returns.reward_to_go(rewards, batch.mask, discount=discount)
    return batch.with_arrays(advantages=normalizer(future, batch.mask)), state

  further = {'proximal_logp', *(f'{name}_logp' for name in anchors)} if anchors else set()
  return Estimator(apply=apply, requires=kl_requires(kl_coefficient) | further)


def kl_to_go() -> Estimator:
  """A_t = -sum over k >= t of (log pi - log reference)(y_k), nats. Rewards are not read.

  On samples of the policy, the policy gradient with these advantages descends KL(pi, reference) (HyPO,
  arXiv:2406.01462).
  """

  def apply(batch, state):
    return batch.with_arrays(advantages=-returns.reward_to_go(k1(batch), batch.mask)), state

  return Estimator(
    apply=apply,
    requires=frozenset({'proximal_logp', 'reference_logp'}),
    scored=frozenset(),
  )


def token_baseline(*, discount: float = 1.0, lone_baseline: bool = False) -> Estimator:
  """Returns minus the variance-minimising baseline of each position in the group (arXiv:2602.07078).

  Needs the statistic `score_norm` of the rollout's policy, from the collector's `stats`. For
  `lone_baseline` see `baselines.optimal_token_baseline`.
  """
  baseline = functools.partial(optimal_token_baseline, lone_baseline=lone_baseline)

  def apply(batch, state):
    future = returns.reward_to_go(token_rewards(batch), batch.mask, discount=discount)
    advantages = call(baseline, batch.with_arrays(token_returns=future))
    return batch.with_arrays(advantages=advantages), state

  return Estimator(apply=apply, requires=frozenset({'score_norm'}))


def generalized(
  *,
  discount: float = 1.0,
  trace: float = 0.95,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """Generalised advantage estimation (arXiv:1506.02438) against a learned value.

  The last policy token gets the reward of its row, and every token its KL penalty. Returns are
  computed before the advantages are normalised.

  Args:
    discount: factor of rewards and values that are one token later.
    trace: decay of the trace, lambda of the paper.
    normalizer: of the advantages.
    kl_coefficient: of a penalty in the reward of every token, log pi - log reference in nats.
  """

  def apply(batch, state):
    rewards, values = token_rewards(batch, kl_coefficient), batch.old_values
    advantages = returns.gae(rewards, values, batch.mask, discount=discount, trace=trace)
    return with_targets(batch, advantages, advantages + values, normalizer), state

  return critic(apply, kl_requires(kl_coefficient))


def vtrace(
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
  rho_pg: float = 1.0,
  normalizer: NormalizerPart = identity,
) -> Estimator:
  """V-trace of IMPALA (arXiv:1802.01561): value targets and advantages for samples of an older policy.

  rho = proximal / behavior, cut at `rho_bar` in the error, at `c_bar` in the trace and at `rho_pg` in
  the advantage.
  """

  def apply(batch, state):
    knobs = dict(discount=discount, trace=trace, rho_bar=rho_bar, c_bar=c_bar)
    arrays = (token_rewards(batch), batch.old_values, log_rho(batch), batch.mask)
    advantages = returns.vtrace_advantages(*arrays, rho_pg=rho_pg, **knobs)
    targets = returns.vtrace_targets(*arrays, **knobs)
    return with_targets(batch, advantages, targets, normalizer), state

  return critic(apply, frozenset({'proximal_logp', 'behavior_logp'}))


def retrace(
  *, discount: float = 1.0, trace: float = 0.95, normalizer: NormalizerPart = whiten
) -> Estimator:
  """Retrace (arXiv:1606.02647) with a critic of states: A_t = target_t - V_t.

  The paper's critic is Q(s, a); ours is V(s) in its place (see `returns.retrace_targets`).
  """

  def apply(batch, state):
    values = batch.old_values
    arrays = (token_rewards(batch), values, log_rho(batch), batch.mask)
    targets = returns.retrace_targets(*arrays, discount=discount, trace=trace)
    return with_targets(batch, targets - values, targets, normalizer), state

  return critic(apply, frozenset({'proximal_logp', 'behavior_logp'}))


def moving_baseline(*, decay: float = 0.9) -> Estimator:
  """A = R - b with b a moving average of the mean rewards of earlier batches.

  b does not depend on the batch that it is subtracted from, so the estimate of the policy gradient is
  exactly unbiased (Williams 1992). State: total = sum_k decay^k r_k and weight = sum_k decay^k, with
  r_k the mean reward k + 1 batches ago; b = total / weight, and 0 for the first batch.
  """

  def apply(batch, state):
    valid, rewards = batch.valid, batch.rewards
    per_row = jnp.where(valid, rewards - average(state), 0.0)
    # A batch without valid rows has no mean.
    rows = jnp.sum(valid)
    mean = jnp.sum(jnp.where(valid, rewards, 0.0)) / jnp.maximum(rows, 1)
    state = averaged(state, mean, rows > 0, decay)
    return batch.with_arrays(advantages=to_tokens(per_row, batch.mask)), state

  return Estimator(apply=apply, init=averages)


def teacher_log_ratio(*, clip: Annotated[float, Range(above=0)] = 10.0) -> Estimator:
  """A_t = clip(teacher_logp - proximal_logp, -clip, clip): sampled reverse-KL distillation.

  Its expectation on the student's samples is minus the gradient of the token-level reverse KL
  (arXiv:2306.13649). Rewards are not read.

  Args:
    clip: largest |A|, nats; infinity is no limit.
  """

  def apply(batch, state):
    gap = jnp.where(batch.mask, batch.teacher_logp - batch.proximal_logp, 0.0)
    return batch.with_arrays(advantages=jnp.clip(gap, -clip, clip)), state

  requires = frozenset({'teacher_logp', 'proximal_logp'})
  return Estimator(apply=apply, requires=requires, scored=frozenset())


def teacher_returns(
  *,
  own: bool = True,
  discount: Fraction = 1.0,
  per_token: bool = False,
  scale: Positive = 1.0,
  clip: float = math.inf,
  normalizer: NormalizerPart = identity,
) -> Estimator:
  """A_t = sum_{s >= t} discount^(s - t) r_s: the reverse KL of whole sequences (arXiv:2306.08543).

  r is clip((teacher_logp - proximal_logp) / scale, -clip, clip). With `own` the sum begins with the
  token's own reward r_t, and the expectation on the student's samples is minus the gradient of
  KL(student || teacher) of sequences, if nothing is clipped, scaled, discounted or normalised. Without
  it, it is the part that later tokens add: the rest is the exact KL of the next token, the divergence
  `reverse_kl`, which has less noise. Rewards of the batch are not read.

  Args:
    own: whether the token's own reward is part of its return.
    discount: factor per token.
    per_token: divide A_t by the number of tokens whose rewards it adds, without discount.
    scale: divides the log-ratio.
    clip: largest |r|; infinity is no limit.
    normalizer: of the advantages.
  """

  def apply(batch, state):
    mask = batch.mask
    gap = jnp.where(mask, (batch.teacher_logp - batch.proximal_logp) / scale, 0.0)
    rewards, ones = jnp.clip(gap, -clip, clip), mask.astype(jnp.float32)
    total = returns.reward_to_go(rewards, mask, discount=discount)
    count = returns.reward_to_go(ones, mask)
    if not own:
      total, count = total - rewards, count - ones
    if per_token:
      total = total / jnp.maximum(count, 1)
    advantages = normalizer(jnp.where(mask, total, 0.0), mask)
    return batch.with_arrays(advantages=advantages), state

  requires = frozenset({'teacher_logp', 'proximal_logp'})
  return Estimator(apply=apply, requires=requires, scored=frozenset())


def preference() -> Estimator:
  """Labels for groups of two: 1 where the row's reward is the larger of its pair (arXiv:2402.04792).

  A tie, or a pair with a failed verifier, is masked out of loss and count.
  """

  def apply(batch, state):
    rewards = batch.rewards.reshape(-1, 2)
    usable = batch.valid.reshape(-1, 2).all(axis=1) & (rewards[:, 0] != rewards[:, 1])
    better = rewards > rewards[:, ::-1]
    mask = batch.mask & jnp.repeat(usable, 2)[:, None]
    label = better.astype(jnp.float32).reshape(-1)
    return batch.with_arrays(label=label, mask=mask), state

  return Estimator(apply=apply, provides=frozenset({'label', 'mask'}))


def compared(*, label: Literal['soft', 'drawn', 'better'] = 'soft') -> Estimator:
  """Labels of the pairs of rows 2i and 2i + 1 by comparison: p is the probability that the row wins
  (arXiv:2403.08635).

  A pair with a failed verifier is masked out of loss and count.

  Args:
    label: 'soft' is p itself. 'drawn' is 1 with probability p and else 0, which has the same expected
      loss, because losses are linear in the label. 'better' is 1 where p > 1/2 and 0 where p < 1/2; a
      pair with p = 1/2 is masked out.
  """

  def apply(batch, state):
    rows, partner = _partners(batch)
    p = batch['wins'][rows, partner % batch['wins'].shape[1]]
    usable = batch.valid & batch.valid[partner]
    if label == 'drawn':
      first = batch['uniform'][rows & ~1] < p[rows & ~1]
      p = jnp.where(first == (rows % 2 == 0), 1.0, 0.0)
    elif label == 'better':
      usable &= p != 0.5
      p = jnp.where(p > 0.5, 1.0, 0.0)
    return batch.with_arrays(label=p, mask=batch.mask & usable[:, None]), state

  return Estimator(
    apply=apply,
    requires=frozenset({'wins', 'uniform'} if label == 'drawn' else {'wins'}),
    provides=frozenset({'label', 'mask'}),
    scored=frozenset(),
  )


def win_rate_gap() -> Estimator:
  """Labels of pairs by win rates: rows 2i and 2i + 1 get sigmoid(r - r') and sigmoid(r' - r).

  r is the mean probability to beat the other valid rows of the group (DNO, arXiv:2404.03715). A pair
  with a failed verifier is masked out of loss and count.
  """

  def apply(batch, state):
    _, partner = _partners(batch)
    rate = _mean_wins(batch)
    usable = batch.valid & batch.valid[partner]
    label = jax.nn.sigmoid(rate - rate[partner])
    return batch.with_arrays(label=label, mask=batch.mask & usable[:, None]), state

  return Estimator(
    apply=apply,
    requires=frozenset({'wins'}),
    provides=frozenset({'label', 'mask'}),
    scored=frozenset(),
  )


def best_of_n(
  *,
  reward: best_of_n_rewards.RewardPart = best_of_n_rewards.log_quantile,
  policy: NotNegative = 1.0,
  reference: NotNegative = 1.0,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """Weights with which a policy learns the best of n samples of a reference (arXiv:2407.14622).

  A group holds samples of the policy and n samples of the reference, the rows with `opponent` 1. A row
  of the policy gets

      A_t = policy (q - mean of q over the other rows of the policy) - kl_coefficient sum over s >= t of
            log(pi / reference)(y_s)

  with q = reward(number of samples of the reference whose reward is at most that of the row, number of
  samples of the reference). The best sample of the reference gets A_t = reference, so it is imitated;
  the other samples of the reference are masked out. The advantages of both kinds of rows are divided by
  the fraction of the rows that are of this kind, so a mean over rows (`sequence_sum`) is the sum of a
  mean over the rows of the policy and a mean over the imitated ones.

  Args:
    reward: q, of rows of the policy.
    policy: factor of the policy gradient.
    reference: factor of the log-likelihood of the best sample of the reference.
    kl_coefficient: of k1 = log pi - log reference, nats.
  """

  def apply(batch, state):
    other = batch['opponent'] > 0
    theirs, ours = batch.valid & other, batch.valid & ~other
    count = total(theirs.astype(jnp.int32), same(batch.group_ids))
    quantile = reward(at_most(batch.rewards, batch.group_ids, theirs), count)
    centred = advantage_functions.leave_one_out(quantile, batch.group_ids, ours)
    best = first_best(batch.rewards, members(batch.group_ids, theirs))

    # Advantages of the rows of the policy, and of the imitated ones.
    gains = policy * to_tokens(centred, batch.mask)
    if kl_coefficient:
      gains -= kl_coefficient * returns.reward_to_go(k1(batch), batch.mask)
    imitated = to_tokens(jnp.full(len(best), reference), batch.mask)
    # What fraction of the rows with tokens is of each kind.
    there = jnp.any(batch.mask, axis=1)
    kept = there & (ours | best)
    share = lambda kind: jnp.sum(there & kind) / jnp.maximum(jnp.sum(kept), 1)
    scaled = jnp.where(
      other[:, None],
      imitated / jnp.maximum(share(best), 1e-8),
      gains / jnp.maximum(share(ours), 1e-8),
    )
    mask = batch.mask & kept[:, None]
    return batch.with_arrays(advantages=jnp.where(mask, scaled, 0.0), mask=mask), state

  return Estimator(
    apply=apply,
    requires=kl_requires(kl_coefficient) | {'opponent'},
    provides=frozenset({'advantages', 'mask'}),
  )


def _partners(batch: Batch) -> tuple[Array, Array]:
  """The indices of all rows, i32[B], and of the other row of each row's pair.

  Raises:
    ValueError: a group has an odd number of rows, so a pair would be of two groups.
  """
  size = batch['wins'].shape[1]
  if size % 2:
    raise ValueError(f'rows are compared in pairs, but a group has {size} rows, an odd number')
  rows = jnp.arange(len(batch.valid))
  return rows, rows ^ 1


def _mean_wins(batch: Batch, with_itself: bool = False) -> Array:
  """`mean_wins` of the rows of a batch, [B]."""
  size = batch['wins'].shape[1]
  wins, valid = batch['wins'].reshape(-1, size, size), batch.valid.reshape(-1, size)
  return mean_wins(wins, valid, with_itself).reshape(-1)


def imitation() -> Estimator:
  """Labels of groups with a demonstration: 1 for the demonstration, 0 for samples (arXiv:2401.01335)."""

  def apply(batch, state):
    label = batch.stream == STREAMS.index('demonstration')
    return batch.with_arrays(label=label.astype(jnp.float32)), state

  return Estimator(
    apply=apply,
    requires=frozenset({'stream'}),
    provides=frozenset({'label'}),
    scored=frozenset(),
  )


def success_contrast(
  *, standardized: bool = False, negative_weight: float = 1.0, least: float = 0.02
) -> Estimator:
  """A = c for right rows and -c negative_weight for wrong ones, and the group's success rate q.

  c = 1 - q, or sqrt((1 - q) / q) if `standardized`; rewards are 0 or 1. For `negative_aware`
  surrogates (arXiv:2505.18116): on-policy the two choices are the weights of Dr. GRPO and of GRPO
  with population std. q is kept in [least, 1 - least]; groups without contrast get 0.
  """

  def apply(batch, state):
    rewards, valid = batch.rewards, batch.valid
    # A reward minus its group-centred value is the mean of the group.
    rate = rewards - group_mean(rewards, batch.group_ids, valid)
    mixed = valid & (rate > 0) & (rate < 1)
    rate = jnp.clip(rate, least, 1 - least)
    scale = jnp.sqrt((1 - rate) / rate) if standardized else 1 - rate
    per_row = scale * jnp.where(rewards > 0.5, 1.0, -negative_weight)
    per_row = jnp.where(mixed, per_row, 0.0)
    advantages = to_tokens(per_row, batch.mask)
    return batch.with_arrays(advantages=advantages, success_rate=rate), state

  return Estimator(apply=apply, provides=frozenset({'advantages', 'success_rate'}))


def win_rate(
  *, with_itself: bool = True, extremes: bool = True, by: Literal['rewards', 'wins'] = 'rewards'
) -> Estimator:
  """Labels in [0, 1]: an estimated probability that the row beats a row of its group.

  label_i = mean over the valid rows j of the group of sigmoid(R_i - R_j): SPPO's estimate
  (arXiv:2405.00675). In the authors' code j may be i, which adds one half to the sum, and only the best
  and the worst row of a group are trained on: of equal rows, the first of the best and the last of the
  worst.

  Args:
    with_itself: whether j may be i; a row without any j gets one half.
    extremes: whether the mask keeps only the best and the worst row of a group.
    by: 'wins' takes the mean of the comparisons `wins` instead of the formula above.
  """

  def apply(batch, state):
    if by == 'wins':
      label = score = _mean_wins(batch, with_itself)
    else:
      label = _win_rates(batch.rewards, batch.group_ids, batch.valid, with_itself)
      score = batch.rewards
    if not extremes:
      return batch.with_arrays(label=label), state
    group = members(batch.group_ids, batch.valid)
    place = rank(-score, group)  # 0 is the first of the best rows
    extreme = (place == 0) | (place == size(group) - 1)
    return batch.with_arrays(label=label, mask=batch.mask & extreme[:, None]), state

  return Estimator(
    apply=apply,
    requires=frozenset({'wins'} if by == 'wins' else ()),
    provides=frozenset({'label', 'mask'}),
    scored=frozenset({'group_ids'} if by == 'wins' else {'rewards', 'group_ids'}),
  )


@jax.jit
def _win_rates(rewards: Array, group_ids: Array, valid: Array, with_itself: bool) -> Array:
  """The mean over valid j of the group, and j != i unless `with_itself`, of sigmoid(R_i - R_j): [B].

  A row without such a j gets one half.
  """
  rows = jnp.arange(len(rewards))

  def label(row):
    others = (group_ids == group_ids[row]) & valid & (with_itself | (rows != row))
    wins = jnp.sum(jnp.where(others, jax.nn.sigmoid(rewards[row] - rewards), 0.0))
    count = jnp.sum(others)
    return jnp.where(count > 0, wins / jnp.maximum(count, 1), 0.5)

  # A few rows at a time: an array of all pairs would have B^2 entries.
  return jax.lax.map(label, rows, batch_size=64)


def self_consistency(*, average: bool = True, least: float = 1e-3) -> Estimator:
  """Pairs by the policy's own implicit rewards, and how far an earlier policy agrees: CREAM
  (arXiv:2410.12735).

  The implicit reward of a row is R = sum_t (logp - reference_logp). Of each group the row with the
  largest R under the policy is chosen and the one with the smallest is rejected (`pair_side`); all
  others leave the mask. The `label` of the group is C = (tau + 1) / 2, tau being Kendall's rank
  correlation of the R of the policy and of the anchor `previous` over the group. A policy that is the
  reference has R = 0 everywhere; its rows are ranked by their mean log-probability instead. Rewards of
  verifiers are not read.

  Args:
    average: give all groups the mean C of the batch.
    least: a policy counts as the reference in a group where all |R| are at most this, nats.
  """

  def apply(batch, state):
    group = members(batch.group_ids, batch.valid & jnp.any(batch.mask, axis=1))
    now, before = (
      _own_rewards(batch[name], batch.reference_logp, batch.mask, group, least)
      for name in ('proximal_logp', 'previous_logp')
    )
    # The first of the best rows and the first of the worst rows of every group whose rows differ.
    usable = maximum(now, group) > minimum(now, group)
    best, worst = (usable & (rank(x, group) == 0) for x in (-now, now))
    label = (kendall_tau(now, before, group) + 1) / 2
    if average:
      label = jnp.full_like(
        label, jnp.sum(jnp.where(best, label, 0)) / jnp.maximum(jnp.sum(best), 1)
      )
    mask = batch.mask & (best | worst)[:, None]
    side = best.astype(jnp.float32) - worst.astype(jnp.float32)
    return batch.with_arrays(label=label, pair_side=side, mask=mask), state

  return Estimator(
    apply=apply,
    requires=frozenset({'proximal_logp', 'reference_logp', 'previous_logp'}),
    provides=frozenset({'label', 'pair_side', 'mask'}),
    scored=frozenset({'group_ids'}),
  )


def _own_rewards(
  logp: Array, reference_logp: Array, mask: Array, group: Groups, least: float
) -> Array:
  """Summed log-ratios to the reference, or mean log-probs in a group where all are near 0: [B]."""
  ratios = jnp.sum(jnp.where(mask, logp - reference_logp, 0), axis=1)
  means = jnp.sum(jnp.where(mask, logp, 0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
  return jnp.where(maximum(jnp.abs(ratios), group) > least, ratios, means)


def divergence_reward(
  *, derivative: f_divergences.Part, beta: float = 1.0, decay: float = 0.9
) -> Estimator:
  """A = -f'(pi / p) - b: descends D_f(pi || p), p = reference exp(R / beta) / Z (arXiv:2302.08215).

  Z is the mean over the group of p's numerator divided by the sampling probability; b is a moving
  average of earlier pseudo-rewards (the paper averages the last 1024), as in `moving_baseline`.
  """

  def apply(batch, state):
    target = jnp.sum(batch.reference_logp, axis=1) + batch.rewards / beta
    sampled = jnp.sum(batch.behavior_logp, axis=1)
    log_z = log_partition.log_partition(target - sampled, valid_groups(batch))
    log_t = jnp.sum(batch.proximal_logp, axis=1) - target + log_z
    pseudo = jnp.where(batch.valid, -derivative(log_t), 0.0)
    return baseline.apply(batch.with_arrays(rewards=pseudo), state)

  baseline = moving_baseline(decay=decay)
  requires = frozenset({'reference_logp', 'proximal_logp', 'behavior_logp'})
  return Estimator(apply=apply, requires=requires, init=baseline.init)


SIMPLE = table(
  'credit',
  nothing,
  outcome,
  reward_to_go,
  kl_to_go,
  token_baseline,
  generalized,
  vtrace,
  retrace,
  moving_baseline,
  teacher_log_ratio,
  teacher_returns,
  preference,
  compared,
  win_rate_gap,
  best_of_n,
  imitation,
  success_contrast,
  win_rate,
  self_consistency,
  bootstrapped_pairs,
  divergence_reward,
  turn_returns,
  gigpo,
  discounted_outcome,
  turn_generalized,
  bilevel_generalized,
  self_correction,
  self_play,
  step_values,
  tree_values,
  decoupled,
  hybrid,
  process_min,
  two_level,
  modes,
  spans_generalized,
  weighed_by_network,
  implicit_process,
  conflict_aware,
  entropy_modulated,
)


def gated(
  *,
  credit: Part,
  limit: Annotated[int, Range(at_least=-1)] = 0,
  threshold: float = 1.0,
  drop_solved: bool = False,
) -> Estimator:
  """Prompts that the policy cannot solve learn from their demonstration, the others from samples.

  A group with at most `limit` samples of reward >= `threshold` keeps only its demonstration in the
  mask, any other only its samples: HPT (arXiv:2509.04419). `credit` sees only samples as valid rows.
  limit = -1 is pure reinforcement, limit = number of samples pure imitation. With `drop_solved`, a
  group whose samples all have such a reward keeps no row: DYPO (arXiv:2604.08926).
  """

  def apply(batch, state):
    sampled = batch.stream == STREAMS.index('sampled')
    solved = sampled & batch.valid & (batch.rewards >= threshold)
    imitate = total(solved.astype(jnp.int32), same(batch.group_ids)) <= limit
    credited, state = credit.apply(batch.with_arrays(valid=batch.valid & sampled), state)
    kept = sampled != imitate
    if drop_solved:
      wrong = sampled & batch.valid & ~solved
      kept &= imitate | (total(wrong.astype(jnp.int32), same(batch.group_ids)) > 0)
    return credited.with_arrays(mask=credited.mask & kept[:, None]), state

  return Estimator(
    apply=apply,
    requires=credit.requires | {'stream'},
    provides=credit.provides | {'mask'},
    init=credit.init,
  )


def graded(
  *,
  credit: Part,
  samples: tuple = (0.0, 0.0, 0.125, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0),
  demonstration: tuple = (1.0, 1.0, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0, 0.0),
  threshold: float = 1.0,
) -> Estimator:
  """The softer gate of HPT's code (arXiv:2509.04419): both kinds of rows have weights by the success.

  A = samples[k] credit of samples, and demonstration[k] of demonstrations, with k the number of samples
  of the group whose reward is at least `threshold`. Rows of weight 0 leave the mask. `credit` sees only
  samples as valid rows. `gated` has weights of 0 and 1.

  Args:
    credit: makes the advantages of samples.
    samples: their weights for k = 0, 1, ..., n. In a group of G samples k is rounded down to a multiple
      of G / n, so the last weight is that of a group that is solved by all.
    demonstration: the same of demonstrations.
    threshold: smallest reward of a solved sample.

  Raises:
    ValueError: not one weight of each kind for every k, or one below 0.
  """
  if len(samples) != len(demonstration) or len(samples) < 2 or min(*samples, *demonstration) < 0:
    raise ValueError(
      f'graded: expected two or more weights, none below 0, of samples and as many of demonstrations, '
      f'got {samples} and {demonstration}'
    )
  tables = jnp.asarray((demonstration, samples), jnp.float32)

  def apply(batch, state):
    sampled = batch.stream == STREAMS.index('sampled')
    usable, group = sampled & batch.valid, same(batch.group_ids)
    solved = total((usable & (batch.rewards >= threshold)).astype(jnp.int32), group)
    drawn = jnp.maximum(total(usable.astype(jnp.int32), group), 1)
    weight = tables[sampled.astype(jnp.int32), solved * (len(samples) - 1) // drawn]
    credited, state = credit.apply(batch.with_arrays(valid=usable), state)
    own = jnp.where(sampled[:, None], credited.advantages, 1.0) * weight[:, None]
    mask = credited.mask & (weight > 0)[:, None]
    return credited.with_arrays(advantages=jnp.where(mask, own, 0.0), mask=mask), state

  return Estimator(
    apply=apply,
    requires=credit.requires | {'stream'},
    provides=credit.provides | {'advantages', 'mask'},
    init=credit.init,
  )


def of_samples(*, credit: Part) -> Estimator:
  """`credit` of the samples alone: demonstrations are in no statistic of their group, but in the mask.

  CHORD (arXiv:2508.11408) imitates demonstrations beside samples whose advantages do not depend on them.
  """

  def apply(batch, state):
    sampled = batch.stream == STREAMS.index('sampled')
    return credit.apply(batch.with_arrays(valid=batch.valid & sampled), state)

  return Estimator(
    apply=apply,
    requires=credit.requires | {'stream'},
    provides=credit.provides,
    init=credit.init,
  )


def by_stream(*, demonstration: Part, sampled: Part) -> Estimator:
  """Demonstrations and samples have their advantages from different estimators.

  Both see all rows, so demonstrations may count in the statistics of samples, and samples in those of
  demonstrations: SRFT (arXiv:2506.19767).

  Args:
    demonstration: makes the advantages of demonstrations.
    sampled: makes those of samples.

  Raises:
    ValueError: one of them makes something else than advantages.
  """
  both = dict(zip(STREAMS, (demonstration, sampled)))
  for name, one in both.items():
    if one.provides != {'advantages'}:
      raise ValueError(
        f'by_stream: {name} makes {sorted(one.provides)}, but advantages are wanted here'
      )

  def apply(batch, state):
    found = {name: one.apply(batch, state[name]) for name, one in both.items()}
    given = batch.stream == STREAMS.index('demonstration')
    made = {name: credited.advantages for name, (credited, _) in found.items()}
    advantages = jnp.where(given[:, None], made['demonstration'], made['sampled'])
    return batch.with_arrays(advantages=advantages), {k: own for k, (_, own) in found.items()}

  return Estimator(
    apply=apply,
    requires=demonstration.requires | sampled.requires | {'stream'},
    init=lambda: {name: one.init() for name, one in both.items()},
    scored=demonstration.scored | sampled.scored,
  )


def without_void(*, credit: Part) -> Estimator:
  """Rows with a void turn leave the loss and stay in the statistics (SimpleTIR, arXiv:2509.02479).

  A turn is void if the policy neither acted nor answered in it (`void_turns`). The reward of such a row
  is still part of the means and deviations of its group, so the other rows are credited as if it were
  there. A batch without `void_turns` has none.
  """

  def apply(batch, state):
    credited, state = credit.apply(batch, state)
    if 'void_turns' in batch:
      kept = ~jnp.any(batch.mask & (batch['void_turns'] > 0), axis=1)
      credited = credited.with_arrays(mask=credited.mask & kept[:, None])
    return credited, state

  return credit._replace(apply=apply, provides=credit.provides | {'mask'})


def down_sampled(
  *,
  credit: Part,
  rows: tuple = (0.25, 0.5),
  tokens: tuple = (0.25, 0.5),
  batches: AtLeastOne = 100,
) -> Estimator:
  """Another estimator, and a mask that keeps the rows and tokens which teach most (D3S,
  arXiv:2509.22115).

  Of the rows with tokens those are kept whose advantages have the largest variance, over all prompts; of
  their tokens, those with the largest |A| H, with H the entropy of the policy. Advantages are those of
  all rows. The two fractions go linearly from their first to their last value. Needs the statistic
  `old_entropy` of the policy, from the collector's `stats`.

  Args:
    credit: makes the advantages, which must be equal in all tokens of a row.
    rows: fraction of the rows at the beginning and at the end.
    tokens: fraction of their tokens likewise.
    batches: collected batches between the two.

  Raises:
    ValueError: not two fractions in (0, 1].
  """
  for name, ends in (('rows', rows), ('tokens', tokens)):
    if len(ends) != 2 or not all(0 < x <= 1 for x in ends):
      raise ValueError(f'{name}: expected two fractions in (0, 1], got {ends}')

  def apply(batch, state):
    credited, inner = credit.apply(batch, state['credit'])
    done = jnp.minimum(state['batches'] / batches, 1)
    now = lambda ends: ends[0] + done * (ends[1] - ends[0])
    mask, advantages = credited.mask, credited.advantages
    there = jnp.any(mask, axis=1)
    # One number a row, that of its first token.
    gains = jnp.take_along_axis(advantages, jnp.argmax(mask, axis=1)[:, None], axis=1)[:, 0]
    number = jnp.ceil(now(rows) * jnp.sum(there) - 1e-4).astype(jnp.int32)
    mask = mask & down_sampling.largest_variance(gains, there, number)[:, None]
    scores = jnp.abs(advantages) * batch['old_entropy']
    mask = down_sampling.largest_scores(scores, mask, now(tokens))
    state = {'credit': inner, 'batches': state['batches'] + 1}
    return credited.with_arrays(mask=mask), state

  return credit._replace(
    apply=apply,
    requires=credit.requires | {'old_entropy'},
    provides=credit.provides | {'mask'},
    init=lambda: {'credit': credit.init(), 'batches': jnp.zeros((), jnp.int32)},
  )


def of_wins(
  *,
  credit: Part,
  against: Literal['group', 'baseline'] = 'group',
) -> Estimator:
  """Another estimator, for which the reward of a row is its mean probability to win, minus 1/2.

  Self-play uses the probability to beat samples of the policy or of an opponent instead of a reward
  (Nash-MD-PG, arXiv:2312.00886; SPO, arXiv:2401.04056).

  Args:
    credit: the estimator that makes advantages of these rewards.
    against: whom the rows play: 'group', the other valid rows of their group (the feature `wins`), or
      'baseline', the other completions of the prompt (`baseline_wins`).
  """

  def apply(batch, state):
    rate = _mean_wins(batch) if against == 'group' else jnp.mean(batch['baseline_wins'], axis=1)
    return credit.apply(with_rewards(batch, rate - 0.5), state)

  return credit._replace(
    apply=apply,
    requires=credit.requires | {'wins' if against == 'group' else 'baseline_wins'},
    scored=credit.scored - {'rewards'},
  )


TABLE |= SIMPLE | table(
  'credit',
  gated,
  graded,
  of_samples,
  by_stream,
  without_void,
  of_wins,
  down_sampled,
  scored_by,
  shaped,
  scaled,
  filtered,
  filtered_by_difficulty,
  with_success_rate,
  token_rewarded,
  appealed,
  hypervolume_guided,
  gradient_guided,
  decomposed,
  laddered,
  of_term,
)


def assign(estimator: Estimator, batch: Batch, state: Any) -> tuple[Batch, Any]:
  """Runs an estimator; rows without a valid reward leave the loss through the mask.

  Args:
    batch: scored and annotated; it may hold more than the estimator reads.
    state: of the estimator.

  Returns:
    The batch with the arrays that the estimator provides, and with its mask: constants, through which
    no gradient flows; and the next state.
  """
  batch = jax.tree.map(jnp.asarray, batch)
  mask = batch.mask & batch.valid[:, None]
  # The estimator finds zeros outside the mask; the batch that is returned keeps what was there.
  zeroed = {n: jnp.where(mask, batch[n], 0) for n in batch if per_token(n, batch[n], mask)}
  credited, state = estimator.apply(batch.with_arrays(**zeroed | {'mask': mask}), state)
  found = {name: credited[name] for name in {'mask', *estimator.provides}}
  return batch.with_arrays(**jax.lax.stop_gradient(found)), state
