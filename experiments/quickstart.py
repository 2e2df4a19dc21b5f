"""The quickstart: a small transformer learns two-digit addition on a CPU in a few minutes.

A short supervised phase brings it to between 10% and 50% greedy accuracy on held-out problems.
Reinforcement then takes it to at least 90%: the loss of DAPO (arXiv:2503.14476; clip-higher, token mean,
dynamic sampling, no KL) without its length penalty, at temperature 0.7, with four updates a batch and a
learning rate that decays. Options: seed, steps, smoke.

    make quickstart
"""

import dataclasses

from polgrad import methods, optim, presets, tasks
from polgrad.compose import compose
from polgrad.options import values
from polgrad.registry import part


def get_config(text: str = ''):
  o = values(text, seed=0, steps=350, smoke=False)
  task = dataclasses.replace(tasks.addition(), temperature=0.7, rows=512)
  minibatches = 4
  decay = part(optim.linear, warmup=20, steps=o.steps * minibatches, end=0.1)
  method = dataclasses.replace(
    methods.dapo(max_new_tokens=task.max_new_tokens),
    rewards={},
    minibatches=minibatches,
    optimizer=part(optim.adamw, learning_rate=5e-4, b2=0.99, schedule=decay),
  )
  model = presets.tiny(alphabet=task.alphabet)
  return compose(method, task, model, steps=o.steps, seed=o.seed, smoke=o.smoke)
