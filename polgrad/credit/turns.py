"""Estimators of credit for rows with several turns; docs/turn_credit.md says which to choose.

They read the reward of each turn (`turn_rewards`), and some of them what the policy read before a turn
(`observation_ids`), in which turns the policy did nothing (`void_turns`) or who took them
(`turn_players`). Batches of environments have these arrays. In a batch without them a row has its reward
in its last turn, and only first turns of a prompt begin in the same state.
"""

from typing import Literal

import jax.numpy as jnp

from polgrad.credit.base import (
  Estimator,
  average,
  averaged,
  averages,
  critic,
  named,
  to_tokens,
  token_rewards,
  turn_ids,
  with_targets,
)
from polgrad.losses import advantages as advantage_functions
from polgrad.losses import entropy_shaping, returns, turns
from polgrad.losses.advantages import (
  NormalizerPart,
  group_normalized,
  identity,
  leave_one_out,
  whiten,
)
from polgrad.losses.groups import joint
from polgrad.registry import AtLeastOne, NotNegative, call
from polgrad.types import Array, Batch

Among = Literal['number', 'state', 'group']


def turn_returns(
  *,
  advantage: advantage_functions.Part = leave_one_out,
  discount: float = 1.0,
  among: Among = 'number',
  players: AtLeastOne = 1,
  normalizer: NormalizerPart = identity,
) -> Estimator:
  """Each token of turn k gets advantage(R_k), R_k = r_k + discount R_{k+1} (standard).

  `advantage` compares turns as it would compare rows, so it must be a function of rewards alone. A turn
  gets no credit for the rewards of earlier turns, which it cannot change.

  Args:
    advantage: of the returns of turns; a baseline, perhaps with a scale.
    discount: of rewards, per turn.
    among: which turns of the samples of a prompt are compared: those of the same 'number' in their rows,
      those that begin in the same 'state' (`observation_ids`), or all turns of the 'group'.
    players: number of players that the policy plays. With more than one, R_k is the reward of the turn
      and the discounted ones of later turns of the same player (`turn_players`).
    normalizer: of the advantages.
  """

  def apply(batch, state):
    ids = turn_ids(batch)
    future = _returns(batch, ids, discount, players)
    compared = _compare(advantage, future, batch, ids, among)
    advantages = turns.at_tokens(compared, ids, batch.mask)
    return batch.with_arrays(advantages=normalizer(advantages, batch.mask)), state

  return Estimator(apply=apply, requires=named(advantage))


def gigpo(
  *,
  advantage: advantage_functions.Part = group_normalized,
  discount: float = 0.95,
  state_weight: float = 1.0,
  per: Literal['trajectory', 'turn'] = 'trajectory',
  void_penalty: float = 0.1,
) -> Estimator:
  """A = advantage(R) + state_weight advantage(R_k): GiGPO (arXiv:2505.10978).

  The first term compares the whole rows of a prompt, as GRPO does. The second compares those of their
  turns that begin in the same state, by their return R_k = r_k + discount R_{k+1}; a turn whose state no
  other turn shares gets 0 from it. A state that one row visits twice counts twice.

  Args:
    advantage: of both terms: `group_normalized`, or `group_mean` (the paper's F_norm = 1).
    discount: of rewards, per turn, in the second term alone.
    state_weight: of the second term, omega in the paper; 0 gives GRPO.
    per: whether each 'trajectory' counts once in the statistics of the first term, as in the paper, or
      each 'turn', as in the released code, where rows with many turns count more.
    void_penalty: subtracted, for a turn in `void_turns`, from its R_k (and not from those of
      earlier turns) and from its R; where a trajectory counts once, the mean over its turns is
      subtracted from R.
  """

  def apply(batch, state):
    ids = turn_ids(batch)
    void = void_penalty * _void(batch, ids)
    steps = _returns(batch, ids, discount) - void
    by_state = turns.at_tokens(_compare(advantage, steps, batch, ids, 'state'), ids, batch.mask)
    if per == 'turn':
      scores = batch.rewards[:, None] - void
      by_row = turns.at_tokens(_compare(advantage, scores, batch, ids, 'group'), ids, batch.mask)
    else:
      number = jnp.maximum(jnp.sum(turns.present(ids, batch.mask), axis=1), 1)
      scores = batch.rewards - jnp.sum(void, axis=1) / number
      by_row = to_tokens(call(advantage, batch.with_arrays(rewards=scores)), batch.mask)
    return batch.with_arrays(advantages=by_row + state_weight * by_state), state

  return Estimator(apply=apply, requires=named(advantage))


def entropy_modulated(
  *,
  advantage: advantage_functions.Part = group_normalized,
  decay: NotNegative = 1.0,
  next_decay: NotNegative = 1.0,
  bonus: float = 0.05,
) -> Estimator:
  """Advantages of turns by how sure the policy was in them and in the next one (EMPG,
  arXiv:2509.09265), see `entropy_shaping.modulated`.

  Needs the statistic `old_entropy` of the policy, from the collector's `stats`.

  Args:
    advantage: of rows.
    decay: how fast the factor of a turn falls with its entropy; 0: all turns have the factor 1.
    next_decay: the same of the bonus, with the entropy of the next turn.
    bonus: weight of the bonus.
  """

  def apply(batch, state):
    knobs = dict(decay=decay, next_decay=next_decay, bonus=bonus)
    arrays = batch['old_entropy'], turn_ids(batch), batch.mask
    found = entropy_shaping.modulated(call(advantage, batch), *arrays, **knobs)
    return batch.with_arrays(advantages=found), state

  return Estimator(apply=apply, requires=named(advantage) | {'old_entropy'})


def discounted_outcome(
  *, advantage: advantage_functions.Part = group_normalized, discount: float = 0.9
) -> Estimator:
  """One advantage per row, of R = sum_k discount^k r_k: a solution counts less the later it comes.

  If the reward is 1 in the turn that solves the problem, R = discount^(failed attempts): the retries of
  AReaL (arXiv:2505.24298).

  Args:
    advantage: of the rows.
    discount: of rewards, per turn before them.
  """

  def apply(batch, state):
    future = returns.turn_returns(
      token_rewards(batch), turn_ids(batch), batch.mask, discount=discount
    )
    first = jnp.argmax(batch.mask, axis=1)[:, None]
    rewards = jnp.take_along_axis(future, first, axis=1)[:, 0]
    advantages = to_tokens(call(advantage, batch.with_arrays(rewards=rewards)), batch.mask)
    return batch.with_arrays(advantages=advantages), state

  return Estimator(apply=apply, requires=named(advantage))


def turn_generalized(
  *, discount: float = 1.0, trace: float = 0.95, normalizer: NormalizerPart = whiten
) -> Estimator:
  """Generalised advantage estimation in which one step is one turn (Turn-PPO, arXiv:2511.20718).

  All tokens of a turn have one advantage and one target, A_k + V_k, with V_k the critic before the first
  token of the turn.

  Args:
    discount: of rewards and values, per turn.
    trace: decay of the errors per turn, lambda.
    normalizer: of the advantages.
  """

  def apply(batch, state):
    ids, values = turn_ids(batch), batch.old_values
    knobs = dict(discount=discount, trace=trace)
    advantages = returns.turn_gae(token_rewards(batch), values, ids, batch.mask, **knobs)
    first = turns.at_tokens(turns.first(values, ids, batch.mask), ids, batch.mask)
    targets = advantages + first
    return with_targets(batch, advantages, targets, normalizer), state

  return critic(apply, frozenset())


def bilevel_generalized(
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  turn_discount: float = 0.95,
  normalizer: NormalizerPart = whiten,
) -> Estimator:
  """Generalised advantages over turns, then over the tokens of each turn: bi-level GAE (RAGEN,
  arXiv:2504.20073); see `returns.bilevel_gae`.

  Args:
    discount: of rewards and values, per token of a turn.
    trace: decay of the errors, lambda of both levels.
    turn_discount: of rewards and values, per turn.
    normalizer: of the advantages; targets of the critic are advantages before it plus values.
  """

  def apply(batch, state):
    values, knobs = batch.old_values, dict(discount=discount, trace=trace)
    advantages = returns.bilevel_gae(
      token_rewards(batch),
      values,
      turn_ids(batch),
      batch.mask,
      turn_discount=turn_discount,
      **knobs,
    )
    return with_targets(batch, advantages, advantages + values, normalizer), state

  return critic(apply, frozenset())


def self_correction(
  *,
  advantage: advantage_functions.Part = leave_one_out,
  bonus: float = 10.0,
  first_turn: bool = True,
) -> Estimator:
  """Turn k gets advantage(r_k + bonus (r_k - r_{k-1})), the first turn advantage(r_0): SCoRe
  (arXiv:2409.12917).

  The reward of a turn is how good its answer is. The bonus for an answer that is better than the one
  before belongs to the later turn alone: if the first turn had a share of it, it would pay to fail
  there. Turns are compared with those of the same number.

  Args:
    advantage: of the rewards of turns.
    bonus: alpha in the paper; 0 is reinforcement of each turn by its own reward.
    first_turn: whether the first turn is trained; stage I of the paper trains only later ones.
  """

  def apply(batch, state):
    ids = turn_ids(batch)
    rewards = turns.totals(token_rewards(batch), ids, batch.mask)
    before = jnp.pad(rewards[:, :-1], ((0, 0), (1, 0)))
    first = jnp.arange(rewards.shape[1]) == 0
    shaped = rewards + jnp.where(first, 0.0, bonus * (rewards - before))
    compared = _compare(advantage, shaped, batch, ids, 'number')
    if not first_turn:
      compared = jnp.where(first, 0.0, compared)
    return batch.with_arrays(advantages=turns.at_tokens(compared, ids, batch.mask)), state

  return Estimator(apply=apply, requires=named(advantage))


def self_play(*, players: AtLeastOne = 2, decay: float = 0.95) -> Estimator:
  """A = R_p - b_p on the turns of player p, R_p the rewards of that player's turns in the row: the
  role-conditioned advantage of SPIRAL (arXiv:2506.24119).

  b_p is a moving average of the mean of R_p in earlier batches, as in `moving_baseline`, so a role that
  has an advantage in the game is compared with itself. Players are `turn_players`; in a batch without
  them they take turns, beginning with player 0.

  Args:
    players: number of players.
    decay: of the moving averages, per batch.
  """

  def apply(batch, state):
    ids = turn_ids(batch)
    player = _players(batch, ids, players)
    # [B, T, players] which tokens are whose; [B, players] who took part in a row, and what it earned.
    own = jnp.where(batch.mask, player, -1)[:, :, None] == jnp.arange(players)[None, None]
    took_part = jnp.any(own, axis=1)
    earned = jnp.sum(jnp.where(own, token_rewards(batch)[:, :, None], 0.0), axis=1)
    per_token = jnp.where(own, (earned - average(state)[None])[:, None, :], 0.0)
    # A player without a turn in the batch has no mean.
    rows = jnp.sum(took_part, axis=0)
    mean = jnp.sum(jnp.where(took_part, earned, 0.0), axis=0) / jnp.maximum(rows, 1)
    state = averaged(state, mean, rows > 0, decay)
    return batch.with_arrays(advantages=jnp.sum(per_token, axis=2)), state

  return Estimator(apply=apply, init=lambda: averages((players,)))


def _returns(batch: Batch, ids: Array, discount: float, players: int = 1) -> Array:
  """R_k of every turn, [B, T] of turns."""
  masks = [batch.mask]
  if players > 1:
    player = _players(batch, ids, players)
    masks = [batch.mask & (player == number) for number in range(players)]
  of = lambda mask: returns.turn_returns(token_rewards(batch), ids, mask, discount=discount)
  return turns.first(sum(map(of, masks)), ids, batch.mask)


def _players(batch: Batch, ids: Array, players: int) -> Array:
  """Who took the turn of each token; without `turn_players` they take turns, player 0 first."""
  return batch['turn_players'] if 'turn_players' in batch else ids % players


def _void(batch: Batch, ids: Array) -> Array:
  """1 for void turns, [B, T] of turns."""
  if 'void_turns' not in batch:
    return jnp.zeros(batch.mask.shape)
  return turns.first(batch['void_turns'], ids, batch.mask)


def _compare(advantage, x: Array, batch: Batch, ids: Array, among: Among) -> Array:
  """An advantage function of rows applied to turns: [B, T] of turns -> [B, T] of turns."""
  exists = turns.present(ids, batch.mask)
  shape = exists.shape
  if among == 'number':
    key = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  elif among == 'state':
    key = _states(batch, ids)
  else:
    key = jnp.zeros(shape, jnp.int32)
  group = joint(jnp.repeat(batch.group_ids, shape[1]), key.ravel())
  rows = {'rewards': x.ravel(), 'group_ids': group, 'valid': exists.ravel()}
  return jnp.where(exists, call(advantage, rows).reshape(shape), 0.0)


def _states(batch: Batch, ids: Array) -> Array:
  """A number of the state in which each turn begins, i32[B, T] of turns."""
  shape = batch.mask.shape
  if 'observation_ids' in batch:
    return turns.first(batch['observation_ids'], ids, batch.mask)
  # Only the state of first turns is known: the prompt. Every other turn gets a number that no other has.
  alone = jnp.arange(shape[0] * shape[1]).reshape(shape)
  return jnp.where(jnp.arange(shape[1]) == 0, -1, alone)
