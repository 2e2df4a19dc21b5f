"""Preference methods that are pipelines of other methods, on tasks that a CPU learns in minutes.

Options: run, gap (mpo), hindsight (rlhs), steps (of each phase), seed, smoke.

    python -m polgrad.train --config=experiments/preference_pipelines.py:run=mpo --workdir=runs/mpo
    python -m polgrad.train --config=experiments/preference_pipelines.py:run=rlhs --workdir=runs/rlhs

`mpo`: mixed preference optimisation (arXiv:2403.19443). The reward of a sum is minus a tenth of its
distance to the right one. Pairs whose rewards differ by at least `gap` are easy, and DPO learns them
first. Then PPO learns the prompts of the other pairs; its reference is the policy that DPO has left.

`rlhs`: reinforcement from hindsight simulation (arXiv:2501.08617). A seller who knows the quality of a
thing, 0 to 9, names a quality. A simulated user buys if it is at least 5, and otherwise has something of
quality 4.5. With hindsight=true the judge compares what two users have got in the end. With
hindsight=false it compares the two answers, and the larger number makes the better impression. The
metric `reward` is the quality that the user gets. The method does not read it.

Measured on a CPU with the defaults, one seed; a run takes minutes. `mpo`, mean reward of greedy answers
to 400 held-out sums: -0.36 before, -1.56 after DPO on the easy pairs, -0.27 after PPO on the hard
prompts. DPO learns its pairs (accuracy 0.87 in its last ten batches) and its answers get worse; chosen
ones lose 0.1 to 0.3 nats, too. `rlhs`, mean quality that users get by sampled answers, over ten steps:

    steps up to       10    20    30    40    50    60
    hindsight       5.17  5.56  5.53  5.62  5.62  5.67
    impressions     5.06  5.21  4.86  4.69  4.52  4.52

Honest answers would give 5.75, and answers that always name 9 give 4.5, which is also where the greedy
answers of the second judge end. Those of the first one stay at 5.75.
"""

import dataclasses
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from polgrad import collect, credit, methods, optim, presets, tasks
from polgrad.compose import compose
from polgrad.data import sources
from polgrad.losses import advantages
from polgrad.options import values
from polgrad.registry import part, weighted

THINGS = 'abcdefghijklmnopqrst'
ANSWERS = 20  # given for each thing and quality
ELSEWHERE = 4.5  # quality of what a user gets who does not buy
LEAST = 5  # quality from which on users buy


def get_config(text: str = ''):
  o = values(text, run='mpo', gap=1.0, hindsight=True, steps=60, seed=0, smoke=False)
  run = dict(steps=o.steps, seed=o.seed, smoke=o.smoke)
  if o.run == 'mpo':
    return mpo(o.gap, **run)
  if o.run == 'rlhs':
    return rlhs(o.hindsight, **run)
  raise ValueError(f"option run: unknown {o.run!r}; valid: ['mpo', 'rlhs']")


def closeness(completion: str, record: dict) -> float:
  """Minus a tenth of the distance to the right number, at least -10; -10 for what is no number."""
  if not completion.isdigit():
    return -10.0
  return -min(abs(int(completion) - int(record['answer'])), 100) / 10


def mpo(gap: float, **run) -> ConfigDict:
  """DPO on easy pairs, then PPO on the prompts of hard ones; `gap` is in units of `closeness`."""
  base = tasks.addition()
  pairs = partial(part, sources.between, source=base.pairs, field='margin')  # ten times the gap
  task = dataclasses.replace(
    base,
    pairs=pairs(at_least=10 * gap),
    problems=pairs(below=10 * gap),
    rewards={'closeness': weighted(1.0, part(closeness))},
  )
  ppo = dataclasses.replace(
    methods.ppo(),
    credit=part(
      credit.generalized, trace=0.95, normalizer=part(advantages.whiten), kl_coefficient=0.05
    ),
    anchors={'reference': part(optim.fixed)},
  )
  model = presets.tiny(alphabet=task.alphabet)
  config = compose(ppo, task, model, **run)
  easy = compose(methods.dpo(), task, model, warm_start=0, **run).phases.train
  order = ('warm_start', 'easy', 'hard')
  phases = config.phases
  with config.unlocked():
    config.phases = dict(zip(order, (phases.warm_start, easy, phases.train)))
    config.order = order
  return config


def things() -> sources.Source:
  """`b7:`: thing b has the quality 7. Of its given answers two out of three are honest."""

  def record(row):
    thing, quality = THINGS[row // 10 % len(THINGS)], row % 10
    rng = np.random.default_rng(row)
    answer = quality if rng.random() < 2 / 3 else int(rng.integers(10))
    return {'prompt': f'{thing}{quality}:', 'answer': str(answer), 'quality': quality}

  return sources.Source(size=10 * len(THINGS) * ANSWERS, record=record)


def claim(completion: str) -> int:
  """The quality that an answer names; -1 if it is no digit."""
  return int(completion) if completion.isdigit() and len(completion) == 1 else -1


def outcome(completion: str, record: dict) -> float:
  """The quality of what the user has in the end."""
  return float(record['quality']) if claim(completion) >= LEAST else ELSEWHERE


def impression(first: str, second: str) -> float:
  """1 if the first answer names the larger quality, 1/2 if both name the same."""
  return (np.sign(claim(first) - claim(second)) + 1) / 2


def regret(first: str, second: str, record: dict) -> float:
  """1 if the first answer has led to the better thing, 1/2 if to the same."""
  return (np.sign(outcome(first, record) - outcome(second, record)) + 1) / 2


def rlhs(hindsight: bool, **run) -> ConfigDict:
  """Online DPO whose judge sees what the two answers lead to, or the answers."""
  task = tasks.Task(
    problems=part(things),
    demonstrations=part(things),
    held_out=part(things),
    rewards={'outcome': weighted(1.0, part(outcome))},
    alphabet=THINGS + '0123456789:',
    prompt_length=4,
    max_new_tokens=2,
    rows=128,
    demonstration_rows=64,
    evaluate_every=20,
    held_out_problems=10 * len(THINGS),  # each once
    evaluation_batch=10 * len(THINGS),
  )
  method = dataclasses.replace(
    methods.online_dpo(),
    collect=partial(collect.Rollouts, samples_per_prompt=2, compare=('wins',)),
    credit=part(credit.compared),
  )
  config = compose(method, task, presets.tiny(alphabet=task.alphabet), **run)
  with config.unlocked():
    config.phases.train.comparison = part(regret if hindsight else impression)
  return config
