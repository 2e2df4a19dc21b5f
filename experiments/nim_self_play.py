"""Self-play in the game of Nim (3 piles of at most 3 stones), on a model made from nothing.

The policy plays both sides of every game, and a row is one game. A short supervised phase on all legal
moves, good and bad, teaches the form of a move. Options: credit, opponent, seed, steps, smoke.
"""

import dataclasses

from polgrad import credit, methods, optim, presets, tasks
from polgrad.compose import compose
from polgrad.options import values
from polgrad.registry import part

CREDIT = {
  # A move is compared with the other moves of the group that were made in the same position.
  'state': part(credit.turn_returns, among='state', players=2),
  # All moves of a player have the result of the game, less the average result of the player.
  'spiral': part(credit.self_play),
  # GRPO without its normaliser: the sum over both players, so a legal game has reward 0.
  'row': part(credit.outcome),
}


def get_config(text: str = ''):
  o = values(text, credit='state', opponent='self', seed=0, steps=100, smoke=False)
  task = dataclasses.replace(
    tasks.nim(opponent=o.opponent), rows=128, samples_per_prompt=32, evaluate_every=10
  )
  method = dataclasses.replace(
    methods.dr_grpo(max_new_tokens=task.max_new_tokens),
    credit=CREDIT[o.credit],
    minibatches=1,
    optimizer=part(optim.adamw, learning_rate=5e-4, b2=0.99),
  )
  model = presets.tiny(alphabet=task.alphabet)
  return compose(method, task, model, steps=o.steps, seed=o.seed, smoke=o.smoke)
