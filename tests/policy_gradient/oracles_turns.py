"""Transcriptions of the functions of turns, written as loops over rows, turns and tokens."""

import numpy as np

from polgrad.losses import aggregation, penalties, returns


def turns_of(ids, mask):
  """The positions of each turn of a row, in order."""
  at = np.flatnonzero(mask)
  return [[t for t in at if ids[t] == k] for k in sorted({*ids[at]})]


def rows(fn):
  """Applies fn(row index, turns as lists of positions) -> {position: value}; 0 elsewhere."""

  def transcription(a):
    out = np.zeros(a.mask.shape)
    for b in range(len(out)):
      for t, value in fn(a, b, turns_of(a.turn_ids[b], a.mask[b])).items():
        out[b, t] = value
    return out

  return transcription


def gae(rewards, values, discount, trace):
  """Advantages of one sequence of steps, the last of which ends it."""
  found, following, after = [], 0.0, 0.0
  for reward, value in zip(rewards[::-1], values[::-1]):
    following = reward + discount * after - value + discount * trace * following
    found.append(following)
    after = value
  return found[::-1]


def turn_returns(a, b, turns, discount=0.9):
  rewards = [sum(a.token_rewards[b, t] for t in turn) for turn in turns]
  future = [sum(discount**j * r for j, r in enumerate(rewards[k:])) for k in range(len(turns))]
  return {t: future[k] for k, turn in enumerate(turns) for t in turn}


def turn_gae(a, b, turns, discount=0.9, trace=0.8):
  rewards = [sum(a.token_rewards[b, t] for t in turn) for turn in turns]
  values = [a['values'][b, turn[0]] for turn in turns]
  found = gae(rewards, values, discount, trace)
  return {t: found[k] for k, turn in enumerate(turns) for t in turn}


def bilevel_gae(a, b, turns, discount=0.9, trace=0.8, turn_discount=0.7):
  ends = [turn[-1] for turn in turns]
  values = [a['values'][b, t] for t in ends]
  found = gae([a.token_rewards[b, t] for t in ends], values, turn_discount, trace)
  out = {}
  for turn, advantage, value in zip(turns, found, values):
    rewards = [a.token_rewards[b, t] for t in turn[:-1]] + [advantage + value]
    out |= dict(zip(turn, gae(rewards, [a['values'][b, t] for t in turn], discount, trace)))
  return out


def turn_mean(a):
  """Turns are the runs of `where` here."""
  means = []
  for loss, where in zip(a.loss, a.where):
    start = None
    for t in range(len(where) + 1):
      inside = t < len(where) and where[t]
      if inside and start is None:
        start = t
      if not inside and start is not None:
        means.append(loss[start:t].mean())
        start = None
  return np.array([sum(means), len(means)])


FUNCTIONS = {
  returns.turn_returns: (dict(discount=0.9), rows(turn_returns)),
  returns.turn_gae: (dict(discount=0.9, trace=0.8), rows(turn_gae)),
  returns.bilevel_gae: (dict(discount=0.9, trace=0.8, turn_discount=0.7), rows(bilevel_gae)),
  aggregation.turn_mean: ({}, turn_mean),
  penalties.turn_k2: (
    dict(turn=1),
    lambda a: (a.turn_ids == 1) * (a.logp - a.reference_logp) ** 2 / 2,
  ),
}
