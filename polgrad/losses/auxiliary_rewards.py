"""Scores that a second, small network gives tokens or rows, and the losses by which it learns.

Three networks: a flow that models hidden states of right answers (RLFR), a predictor of random targets
whose error is an exploration bonus (RDD), and a model that predicts the success of prompts from results
of other prompts (V0). The functions take what the networks give. `objectives.networks` has the first two
networks, and `curricula.in_context` the third. A function of `TABLE` makes rewards of tokens, for the
slot `rewards` of `credit.token_rewarded`.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import chex
import jax
import jax.numpy as jnp

from polgrad.losses.groups import divide
from polgrad.registry import AtLeastOne, Fraction, Range, table
from polgrad.types import Array

Inside = Annotated[float, Range(above=0, below=1)]


def neighbours(
  hidden: Array, mask: Array, *, side: Literal['before', 'after'] = 'before'
) -> tuple[Array, Array]:
  """(condition, where): the hidden state beside each token in its row, the condition of the flow.

  A token has no condition if it or its neighbour is outside the mask; it is left out of `where` then.

  Args:
    hidden: [B, T, D].
    mask: bool[B, T].
    side: 'before' takes the previous token (`token_post` in the release), 'after' the next one.

  Returns:
    [B, T, D], 0 where there is no neighbour, and bool[B, T].
  """
  chex.assert_rank([hidden, mask], [3, 2])
  chex.assert_equal_shape_prefix([hidden, mask], 2)
  mask = mask.astype(bool)
  if side == 'before':
    beside, inside = (jnp.pad(x[:, :-1], ((0, 0), (1, 0), *r)) for x, r in _both(hidden, mask))
  else:
    beside, inside = (jnp.pad(x[:, 1:], ((0, 0), (0, 1), *r)) for x, r in _both(hidden, mask))
  where = mask & inside
  return jax.lax.stop_gradient(jnp.where(where[..., None], beside, 0)), where


def noised(target: Array, noise: Array, s: Array) -> Array:
  """x_s = s target + (1 - s) noise, the input of the flow at time s in [0, 1].

  Args:
    target: [..., D], hidden states.
    noise: [..., D], standard normal.
    s: [...]; in training sigmoid of a standard normal number.
  """
  chex.assert_equal_shape([target, noise])
  s = jnp.asarray(s)[..., None]
  return s * jax.lax.stop_gradient(target) + (1 - s) * noise


def flow_error(velocity: Array, target: Array, noise: Array) -> Array:
  """mean_d (v - (target - noise))^2, the flow-matching loss of each token (arXiv:2210.02747).

  Args:
    velocity: [..., D], what the flow gives at `noised(target, noise, s)`; it has the gradient.
    target: [..., D].
    noise: [..., D].

  Returns:
    [...].
  """
  chex.assert_equal_shape([velocity, target, noise])
  return jnp.mean(jnp.square(velocity - jax.lax.stop_gradient(target - noise)), axis=-1)


def flow_score(velocity: Array, target: Array, noise: Array, *, s: Inside = 0.8) -> Array:
  """s / (1 - s) x `flow_error`: how far a hidden state is from those that the flow models. No gradient.

  Average it over layers, and over times if there are several. At s = .8 the factor is 4.
  """
  return jax.lax.stop_gradient(s / (1 - s) * flow_error(velocity, target, noise))


def flow_rewards(
  flow_scores: Array,
  mask: Array,
  *,
  threshold: Fraction = 0.6,
  keep: AtLeastOne = 15,
  coefficient: float = -0.01,
) -> Array:
  """Rewards of tokens of the scores of a flow: RLFR (arXiv:2510.10201).

      n = (score - min) / (max - min) in each row;  n = 0 if n <= threshold, or if n is not one of the
      `keep` largest of its row;  reward = coefficient n

  The minimum is over scores that are not 0, because a score of 0 means that there is none. Of equal
  scores the first ones are kept. The sums of rewards from each token on are added to the advantage of
  the outcome, after that was normalised.

  Args:
    flow_scores: [B, T], not negative.
    mask: bool[B, T].
    threshold: least normalised score; at 1 all rewards are 0.
    keep: tokens of a row that are rewarded, at most.
    coefficient: of the normalised score; 0 gives rewards of 0.

  Returns:
    [B, T], 0 outside the mask and in rows whose scores are all equal. No gradient.

  >>> import jax.numpy as jnp
  >>> from polgrad.losses import auxiliary_rewards
  >>> scores = jnp.array([[0.1, 0.7, 1.0, 0.4]])
  >>> rewards = auxiliary_rewards.flow_rewards(scores, jnp.ones((1, 4), bool))
  >>> print((1000 * abs(rewards)).round(2))
  [[ 0.    6.67 10.    0.  ]]

  Confidence: CODE. The release takes the second smallest distinct value of the masked row as the
  minimum. With padding that is the smallest score; without padding it is another one, which is not
  copied here.
  """
  chex.assert_rank([flow_scores, mask], 2)
  chex.assert_equal_shape([flow_scores, mask])
  scores = jax.lax.stop_gradient(flow_scores)
  given = mask.astype(bool) & (scores != 0)
  least = jnp.min(jnp.where(given, scores, jnp.inf), axis=1, keepdims=True)
  most = jnp.max(jnp.where(given, scores, -jnp.inf), axis=1, keepdims=True)
  distance = jnp.where(given, scores - least, 0)
  n = divide(distance, jnp.where(most > least, most - least, 0))
  n = jnp.where(given & (n > threshold), n, 0)
  # The place of each token when those of its row are sorted, the largest first.
  place = jnp.argsort(jnp.argsort(-n, axis=1, stable=True), axis=1)
  return coefficient * jnp.where(place < keep, n, 0)


def distilled_error(prediction: Array, mean: Array, noise: Array, *, sigma: float = 1.0) -> Array:
  """mean_d (f - y)^2, the loss of RDD's predictor; y = mean + sigma noise is new at every visit.

  Args:
    prediction: [..., D], f of the state; it has the gradient.
    mean: [..., D], what a fixed random network gives for the state.
    noise: [..., D], standard normal, another one at every visit.
    sigma: standard deviation of the targets; at 0 this is random network distillation
      (arXiv:1810.12894).

  Returns:
    [...].
  """
  chex.assert_equal_shape([prediction, mean, noise])
  return jnp.mean(jnp.square(prediction - jax.lax.stop_gradient(mean + sigma * noise)), axis=-1)


def distilled_bonus(prediction: Array, mean: Array) -> Array:
  """mean_d (f - mean)^2, RDD's exploration bonus; its unit is that of sigma^2. No gradient.

  If f is the average of the targets of n visits of the state, the bonus has the mean sigma^2 / n, so it
  counts visits. That the bonus compares with `mean` and not with a new target, which would add sigma^2,
  is a choice that the paper leaves open.

  Confidence: PAPER.
  """
  chex.assert_equal_shape([prediction, mean])
  return jax.lax.stop_gradient(jnp.mean(jnp.square(prediction - mean), axis=-1))


def context_loss(
  score: Array, rewards: Array, context_ids: Array, valid: Array, *, rank: Fraction = 0.25
) -> Array:
  """rank x ranking + (1 - rank) x cross-entropy: the loss of V0, a model of prompts' success.

      ranking       = mean of -log sigmoid(score_i - score_j) over all pairs of one context with
                      R_i = 1 and R_j = 0
      cross-entropy = mean over rows of -R log sigmoid(score) - (1 - R) log sigmoid(-score)

  A context is a policy with results of other prompts. The cross-entropy falls if the model only learns
  the mean success of each context. The ranking does not change if a number is added to all scores of a
  context, so this shortcut does not lower it.

  Args:
    score: [B], logit of the success of a prompt in its context; it has the gradient.
    rewards: [B], 0 or 1.
    context_ids: i32[B], the context of each row.
    valid: bool[B].
    rank: weight of the ranking.

  Returns:
    f32[]; a part without pairs, or without rows, is 0.

  Confidence: PAPER, from a detailed account of it; no code is released.
  """
  chex.assert_rank([score, rewards, context_ids, valid], 1)
  chex.assert_equal_shape([score, rewards, context_ids, valid])
  right = rewards > 0.5
  pairs = right[:, None] & ~right[None] & valid[:, None] & valid[None]
  pairs &= context_ids[:, None] == context_ids[None]
  ranking = _mean(jax.nn.softplus(score[None] - score[:, None]), pairs)
  entropy = _mean(jax.nn.softplus(jnp.where(right, -score, score)), valid)
  return rank * ranking + (1 - rank) * entropy


def _both(hidden: Array, mask: Array) -> tuple:
  """The two arrays, each with the padding of its axes behind [B, T]."""
  return (hidden, ((0, 0),)), (mask, ())


def _mean(x: Array, where: Array) -> Array:
  return divide(jnp.sum(jnp.where(where, x, 0)), jnp.sum(where).astype(x.dtype))


TABLE = table('auxiliary_rewards', flow_rewards)
Part = Annotated[Callable, TABLE]
