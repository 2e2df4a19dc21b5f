"""Self-play in the game of Nim (3 piles of at most 3 stones), on a model that is trained from scratch.

The policy plays both sides of every game, and a row is one game. A short supervised phase on all legal
moves, good and bad, teaches the form of a move. Evaluation is greedy, from the 48 positions that can be
won. Options: credit ('state', 'spiral' or 'row'), opponent, rows (games of a step), samples (of a
prompt), entropy (coefficient of an entropy bonus), rate (of learning), warm_start, seed, steps, smoke.

    python -m polgrad.train --config=experiments/nim_self_play.py --workdir=runs/nim

Measured with 128 games a step, one seed, on a CPU. `won` is the fraction of evaluation games that are
won against perfect play (standard error 0.07). `best` is the fraction of sampled moves that keep a won
position won, and `illegal` that of illegal moves, both of the ten steps before:

    step                        0    10    20    30    40    50    60    70    80    90   100
    state, won               0.12  0.23  0.27  0.33  0.33  0.33  0.33  0.38  0.38  0.38  0.35
    state, best                 -  0.39  0.43  0.47  0.60  0.59  0.55  0.61  0.56  0.59  0.58
    state, illegal              -  0.25  0.16  0.12  0.03  0.02  0.01  0.01  0.01  0.01  0.01
    spiral, samples=8, won   0.12  0.21  0.25  0.38  0.35  0.38  0.33  0.35  0.38
    spiral, samples=8, best     -  0.40  0.45  0.51  0.57  0.57  0.56  0.51  0.52
    bonus, won               0.12  0.23  0.33  0.33  0.40  0.38  0.33
    bonus, best                 -  0.38  0.51  0.47  0.52  0.64  0.65
    bonus, illegal              -  0.24  0.15  0.16  0.04  0.02  0.02

A player who makes any legal move with the same probability wins 0.28 of these games against perfect
play and 0.54 against a random opponent. Against a random opponent the greedy policy wins 0.60 of
them after 100 steps with `state`, and 0.69 after 80 with `spiral`. Illegal moves are gone after 50
steps; the entropy of a token falls from 0.5 to 0.1 nats and learning slows down. The two kinds of
credit had other numbers of samples of a prompt, so the table does not compare them.

`bonus` is `state` with entropy=0.05 and samples=64: after 60 steps more of the sampled moves are good,
and no more games are won. With entropy=0.1 and rate=1e-3, 0.31 of the games are won after 70 steps. No
setting that was tried wins clearly more games than a player of random legal moves.
"""

import dataclasses

from polgrad import credit, methods, optim, presets, tasks
from polgrad.compose import compose
from polgrad.losses import penalties
from polgrad.options import values
from polgrad.registry import part, weighted

CREDIT = {
  # A move is compared with the other moves of the group that were made in the same position.
  'state': part(credit.turn_returns, among='state', players=2),
  # All moves of a player have the result of the game, less the average result of the player.
  'spiral': part(credit.self_play),
  # GRPO without its normaliser: the sum over both players, so a legal game has reward 0.
  'row': part(credit.outcome),
}


def get_config(text: str = ''):
  o = values(
    text,
    **dict(credit='state', opponent='self', rows=128, samples=32, entropy=0.0, rate=5e-4),
    **dict(warm_start=180, seed=0, steps=100, smoke=False),
  )
  task = dataclasses.replace(
    tasks.nim(opponent=o.opponent), rows=o.rows, samples_per_prompt=o.samples, evaluate_every=10
  )
  method = dataclasses.replace(
    methods.dr_grpo(max_new_tokens=task.max_new_tokens),
    credit=CREDIT[o.credit],
    minibatches=1,
    optimizer=part(optim.adamw, learning_rate=o.rate, b2=0.99),
  )
  model = presets.tiny(alphabet=task.alphabet)
  run = dict(warm_start=o.warm_start, steps=o.steps, seed=o.seed, smoke=o.smoke)
  config = compose(method, task, model, **run)
  if o.entropy:
    bonus = weighted(o.entropy, part(penalties.negative_entropy))
    config.phases.train.objective.penalties = {'bonus': bonus}
  return config
