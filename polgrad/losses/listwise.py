"""Losses of several completions of one prompt, compared by their rewards.

A function of `TABLE` fills the slot `loss` of `objectives.Listwise`. It returns each row's part of the
loss of its prompt, [B]; the parts of a group (rows with equal `group_ids`) add up to the formula. r is
the score, an implicit reward that is multiplied by beta already (see `implicit_rewards`), R the reward,
and K the number of rows in the group. Rewards are constants.

`alpha` turns rewards into the distribution p = softmax(R / alpha) over the rows of a group; alpha = 0 is
its limit, all mass on the row with the largest reward, of equal ones on the first.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses import preference_losses, self_improvement
from polgrad.losses._common import gumbel
from polgrad.losses.groups import Groups, maximum, partner, rank, same, size, total
from polgrad.registry import AtLeastOne, Fraction, NotNegative, Positive, Range, table
from polgrad.types import STREAMS, Array


def infonca(score: Array, rewards: Array, group_ids: Array, *, alpha: NotNegative = 0.0) -> Array:
  """-sum_k p_k log softmax(r)_k: InfoNCA (arXiv:2402.05369).

  The minimiser has r_k = R_k / alpha up to a constant of the prompt. With K = 2 and alpha = 0 this is
  DPO.

  Args:
    score: [B].
    rewards: [B].
    group_ids: i32[B].
    alpha: temperature of the rewards, in their units.

  Returns:
    [B].
  """
  group = _same(score, rewards, group_ids)
  return -_target(rewards, group, alpha) * _log_softmax(score, group)


def bag(score: Array, rewards: Array, group_ids: Array, *, instance: Fraction = 0.5) -> Array:
  """(1 - r) (y - mean_k s_k)^2 + r mean_k (y - s_k)^2, y = mean_k R_k: labels that are known only as the
  mean of a bag, the group (arXiv:2401.11081).

  The second part is the first plus the variance of the scores within the group, so with r > 0 scores of
  a group are drawn together. r = 0 leaves them free: unbiased, and noisy for large groups.

  Args:
    score: [B].
    rewards: [B], of which only the mean of each group is used.
    group_ids: i32[B].
    instance: r in [0, 1], the weight of the loss of single instances.

  Returns:
    [B], each row's part.
  """
  group = _same(score, rewards, group_ids)
  count = size(group)
  label = total(rewards, group) / count
  whole = jnp.square(label - total(score, group) / count)
  return ((1 - instance) * whole + instance * jnp.square(label - score)) / count


def nca(score: Array, rewards: Array, group_ids: Array, *, alpha: NotNegative = 0.0) -> Array:
  """-sum_k [p_k log sigmoid(r_k) + (1/K) log sigmoid(-r_k)]: NCA (arXiv:2402.05369).

  The minimiser is r_k = log(K p_k). It fixes each score, not only differences of scores, so the
  probability of the best completion need not fall.

  Args:
    score: [B].
    rewards: [B].
    group_ids: i32[B].
    alpha: temperature of the rewards, in their units.

  Returns:
    [B].
  """
  group = _same(score, rewards, group_ids)
  p = _target(rewards, group, alpha)
  return p * jax.nn.softplus(-score) + jax.nn.softplus(score) / size(group)


def exo(score: Array, rewards: Array, group_ids: Array, *, alpha: Positive = 0.5) -> Array:
  """KL(q, p) = sum_k q_k log(q_k / p_k), q = softmax(r): EXO on rewards (arXiv:2402.00856).

  Like `infonca` it is minimal at q = p, but it is the other direction of the divergence: the score of a
  completion whose p is small is pushed down hard.

  Args:
    score: [B].
    rewards: [B].
    group_ids: i32[B].
    alpha: temperature of the rewards, in their units, above 0.

  Returns:
    [B].
  """
  group = _same(score, rewards, group_ids)
  log_q = _log_softmax(score, group)
  return jnp.exp(log_q) * (log_q - _log_softmax(rewards / alpha, group))


def hard_negatives(
  score: Array, rewards: Array, group_ids: Array, uniform: Array, *, negatives: AtLeastOne = 1
) -> Array:
  """-log softmax(r)_best over the best row and some others, drawn by their scores: MC-PO
  (arXiv:2502.04567).

  The best row is the first with the largest reward. The others are drawn without replacement with
  probabilities in proportion to exp(r), so the ones that the policy finds likely are contrasted most.
  With as many `negatives` as there are others this is `infonca` with alpha = 0, and with two rows DPO.

  Args:
    score: [B].
    rewards: [B].
    group_ids: i32[B].
    uniform: [B], random numbers in [0, 1); they decide the draws.
    negatives: number of others.

  Returns:
    [B]; 0 in all rows but the best.
  """
  group = _same(score, rewards, group_ids)
  best = _best(rewards, group)
  order = jnp.where(best, jnp.inf, jax.lax.stop_gradient(score) + gumbel(uniform))
  kept = rank(-order, group) <= negatives
  return jnp.where(best, -_log_softmax(score, group, kept), 0)


def apo_down(score: Array, label: Array, group_ids: Array) -> Array:
  """sigmoid(r_w) + sigmoid(r_l - r_w) of a pair: APO-down (arXiv:2408.06266).

  Both completions get less likely, the rejected one more so: for pairs that are worse than what the
  policy writes. A label p between 0 and 1 weighs the two orders of the pair by p and 1 - p.

  Args:
    score: [B].
    label: [B], 1 for the chosen row w, 0 for the rejected row l.
    group_ids: i32[B]; a pair is a group of two rows. Rows of other groups have loss 0.

  Returns:
    [B].
  """
  chex.assert_equal_shape([score, label, group_ids])
  other = partner(same(group_ids))
  paired = other != jnp.arange(len(score))
  both = jax.nn.sigmoid(score) + jax.nn.sigmoid(score[other] - score)
  return jnp.where(paired, label * both, 0)


def decoupled(
  score: Array,
  rewards: Array,
  mask: Array,
  group_ids: Array,
  *,
  least: float = 1.0,
  temperature: Positive = 10.0,
  spread: Positive = 0.1,
  longest: AtLeastOne = 8192,
) -> Array:
  """tau log mean_j exp(r_j / tau) - sum_i w_i r_i / sum_i w_i over the wrong rows j and the right rows i
  of a group, w_i = exp((1 - L_i / longest) / spread): DRPO (arXiv:2510.04474).

  L is the length of a row, and tau the `temperature`. A length reward that acts among right rows alone
  never gives a right row a negative weight, however long it is. w are the weights of the best policy
  near the right rows: of reward 1 - L / longest less `spread` times the KL.

  Args:
    score: [B], usually the mean log-probability of a token.
    rewards: [B].
    mask: bool[B, T].
    group_ids: i32[B].
    least: least reward of a right row, in units of the reward.
    temperature: a large one weighs all wrong rows alike, a small one the most likely alone.
    spread: a large one weighs all right rows alike, a small one the shortest alone.
    longest: number of tokens that lengths are compared with.

  Returns:
    [B]; 0 in a group without right or without wrong rows.
  """
  group = _same(score, rewards, group_ids)
  chex.assert_rank(mask, 2)
  right = rewards >= least
  number = lambda kind: total(kind.astype(jnp.int32), group)
  mixed = (number(right) > 0) & (number(~right) > 0)
  lengths = jnp.sum(mask, axis=-1).astype(score.dtype)
  weights = jnp.exp(_log_softmax(-lengths / (longest * spread), group, right))
  weights = jnp.where(mixed & right, weights, 0)
  # Each wrong row has an equal part of the loss of all.
  top = jnp.where(
    mixed, maximum(jnp.where(right, -jnp.inf, jax.lax.stop_gradient(score)), group), 0
  )
  scaled = jnp.where(right, -jnp.inf, (score - top) / temperature)
  wrongs = jnp.maximum(number(~right), 1)
  mean = total(jnp.exp(scaled), group) / wrongs
  soft_top = top + temperature * jnp.log(jnp.where(mixed, mean, 1))
  return jnp.where(mixed & ~right, soft_top / wrongs, 0) - weights * score


def chosen_pair(score: Array, label: Array, pair_side: Array, group_ids: Array) -> Array:
  """p softplus(-h) + (1 - p) softplus(h), h = r_w - r_l of two rows of the group: CREAM
  (arXiv:2410.12735).

  Args:
    score: [B].
    label: [B], p, the probability that w is the better row.
    pair_side: [B], 1 for w, -1 for l, and 0 for the other rows of the group.
    group_ids: i32[B].

  Returns:
    [B]; 0 in all rows but w.
  """
  chex.assert_equal_shape([score, label, pair_side, group_ids])
  gap = total(pair_side * score, same(group_ids))
  return jnp.where(pair_side > 0, preference_losses.logistic(gap, label), 0)


def given_above(score: Array, stream: Array, group_ids: Array) -> Array:
  """softplus(r_i - r_g) / n for each of the n samples of a group, g its given completion: the loss of a
  discriminator (GAD, arXiv:2511.10643).

  Its minimum over all scores, for independent samples of two distributions T (given) and S, is at
  r = log T / S + c.

  Args:
    score: [B].
    stream: i32[B], which rows are sampled and which are given, see `types.STREAMS`.
    group_ids: i32[B].

  Returns:
    [B]; 0 in given rows, and in groups without one.

  >>> score, stream, groups = jnp.array([1.0, 0.0, 2.0]), jnp.array([1, 1, 0]), jnp.zeros(3, int)
  >>> print(listwise.given_above(score, stream, groups).round(4))
  [0.1566 0.0635 0.    ]
  """
  chex.assert_equal_shape([score, stream, group_ids])
  group = same(group_ids)
  given = stream == STREAMS.index('demonstration')
  samples = total((~given).astype(score.dtype), group)
  gap = score - total(jnp.where(given, score, 0), group)
  there = ~given & (total(given.astype(score.dtype), group) > 0)
  return jnp.where(there, jax.nn.softplus(gap) / jnp.maximum(samples, 1), 0)


def two_pairs(score: Array, pair_side: Array, given_side: Array, group_ids: Array) -> Array:
  """softplus(-h) + softplus(-h'), h and h' the differences r_w - r_l of two pairs of rows of the group:
  SeRA (arXiv:2410.09362).

  Args:
    score: [B].
    pair_side: [B], 1 for w of the first pair, -1 for l, and 0 for other rows.
    given_side: [B], the same of the second pair. A row may be in both; a group may lack either.
    group_ids: i32[B].

  Returns:
    [B]; 0 in all rows but the w of either pair.
  """
  chex.assert_equal_shape([score, pair_side, given_side, group_ids])
  group = same(group_ids)
  each = [
    jnp.where(side > 0, jax.nn.softplus(-total(side * score, group)), 0)
    for side in (pair_side, given_side)
  ]
  return sum(each)


def token_pair(
  logp: Array,
  reference_logp: Array,
  token_weights: Array,
  label: Array,
  group_ids: Array,
  mask: Array,
  beta: Array,
) -> Array:
  """p softplus(-z_t) + (1 - p) softplus(z_t), z_t = beta (s_w D_w - s_l D_l) at position t, averaged
  over the positions of a pair: OPA-DPO as its authors code it (arXiv:2501.09695).

  D is logp - reference_logp, and s the weight of a token. This compares completions position by
  position, which makes sense where one is an edited copy of the other.

  Args:
    logp: [B, T], nats.
    reference_logp: [B, T], nats, constant.
    token_weights: [B, T], s, constant.
    label: [B], p, the probability that the row is the better one.
    group_ids: i32[B]; a pair is a group of two rows. Rows of other groups have loss 0.
    mask: bool[B, T]. A position counts if either row has a token there; a missing token has D = 0.
    beta: [], what multiplies scores.

  Returns:
    [B], half of the pair's loss at each of its rows.
  """
  chex.assert_equal_shape([logp, reference_logp, token_weights, mask])
  other = partner(same(group_ids))
  ratios = jnp.where(mask, token_weights * (logp - reference_logp), 0)
  z = beta * (ratios - ratios[other])
  where = mask | mask[other]
  loss = preference_losses.logistic(z, jnp.broadcast_to(label[:, None], z.shape))
  mean = jnp.sum(jnp.where(where, loss, 0), axis=1) / jnp.maximum(jnp.sum(where, axis=1), 1)
  return jnp.where(other != jnp.arange(len(label)), mean / 2, 0)


def srpo(
  score: Array,
  label: Array,
  shown_label: Array,
  group_ids: Array,
  *,
  alpha: Annotated[float, Range(at_least=0, at_most=1)] = 0.5,
) -> Array:
  """`self_improvement.srpo` of the six rows of a pair: SRPO (arXiv:2406.01660).

  The rows are the chosen completion w and the rejected one l, each after the prompt (u_w, u_l), after a
  prompt that shows l (a_wl, a_ll), and after one that shows w (a_ww, a_lw).

  Args:
    score: [B], beta times the log-ratio to the reference.
    label: [B], 1 for w, 0 for l.
    shown_label: [B], the label of the completion that the prompt shows, -1 if it shows none.
    group_ids: i32[B]; the rows of a pair are a group of six. Rows of other groups have loss 0.
    alpha: weight of the reviser's loss, in [0, 1].

  Returns:
    [B], a sixth of the pair's loss at each of its rows.
  """
  chex.assert_equal_shape([score, label, shown_label, group_ids])
  group = same(group_ids)

  def of(completion: int, shown: int) -> Array:
    where = ((label > 0.5) == completion) & (shown_label == shown)
    return total(jnp.where(where, score, 0), group)

  generator = dict(u_w=of(1, -1), u_l=of(0, -1))
  reviser = dict(a_wl=of(1, 0), a_ll=of(0, 0), a_lw=of(0, 1), a_ww=of(1, 1))
  loss = self_improvement.srpo(**generator, **reviser, beta=1.0, alpha=alpha)
  return jnp.where(size(group) == 6, loss / 6, 0)


def right_and_wrong(
  score: Array, rewards: Array, group_ids: Array, *, threshold: float = 1.0
) -> Array:
  """Mean over all pairs of a right row s and a wrong row f of softplus(-(r_s - r_f)): DYPO
  (arXiv:2604.08926).

  A group whose rows are all right or all wrong has no pair, and loss 0. Where all scores of a group
  are equal, the gradient is -1/2 (mean of right scores' gradients - mean of wrong ones'). That is
  1 / (2 P (1 - P)) times the one of REINFORCE with the group mean as baseline, P being the fraction of
  right rows. A group of two is logistic DPO.

  Args:
    score: [B].
    rewards: [B].
    group_ids: i32[B].
    threshold: smallest reward of a right row.

  Returns:
    [B], the part of a pair is that of its right row.
  """
  group = _same(score, rewards, group_ids)
  score, group_ids = jnp.asarray(score), jnp.asarray(group_ids)
  right = rewards >= threshold
  number = total(right.astype(score.dtype), group)
  pairs = number * (size(group) - number)

  def beaten(row):
    wrong = (group_ids == group_ids[row]) & ~right
    return jnp.sum(jnp.where(wrong, jax.nn.softplus(score - score[row]), 0))

  # A few rows at a time: an array of all pairs would have B^2 entries.
  losses = jax.lax.map(beaten, jnp.arange(len(score)), batch_size=8)
  return jnp.where(right & (pairs > 0), losses / jnp.maximum(pairs, 1), 0)


def _same(score: Array, rewards: Array, group_ids: Array) -> Groups:
  """The groups of equal ids; refuses arrays that are not all [B]."""
  chex.assert_rank(score, 1)
  chex.assert_equal_shape([score, rewards, group_ids])
  return same(group_ids)


def _target(rewards: Array, group: Groups, alpha: float) -> Array:
  """p of every row, [B]."""
  if alpha == 0:
    return _best(rewards, group).astype(rewards.dtype)
  return jnp.exp(_log_softmax(rewards / alpha, group))


def _best(rewards: Array, group: Groups) -> Array:
  """bool[B]: the first row of each group with the largest reward."""
  return rank(-rewards, group) == 0


def _log_softmax(x: Array, group: Groups, kept: Array | bool = True) -> Array:
  """x minus the logarithm of the sum of exp(x) over the rows of the group that are kept, [B]."""
  top = maximum(jnp.where(kept, jax.lax.stop_gradient(x), -jnp.inf), group)
  shifted = x - top
  return shifted - jnp.log(total(jnp.where(kept, jnp.exp(jnp.where(kept, shifted, 0)), 0), group))


TABLE = table(
  'listwise',
  infonca,
  bag,
  nca,
  exo,
  hard_negatives,
  apo_down,
  decoupled,
  chosen_pair,
  two_pairs,
  token_pair,
  right_and_wrong,
  srpo,
  given_above,
)
Part = Annotated[Callable, TABLE]
