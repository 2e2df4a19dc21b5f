"""Variational preference learning (arXiv:2408.10075) of users with opposite tastes, on a model that is
trained from scratch.

Half of eight users prefer warm colours, the others cold ones. A reward model that gives every completion
one score is right about half of the pairs, whatever it learns. `methods.vpl` reads four other pairs of
the user who labelled a pair, and finds the taste in them. Options: method (vpl or
bradley_terry), kl_weight, seed, steps, smoke.

    python -m polgrad.train --config=experiments/tastes.py --workdir=runs/tastes
    python -m polgrad.train --config=experiments/tastes.py:method=bradley_terry --workdir=runs/one_taste

Accuracy on 256 held-out pairs, measured on a CPU in about a minute each:

    updates                        0     50    100    150
    vpl                         0.48   1.00   1.00   1.00
    vpl, seed=1                 0.46   1.00   1.00   1.00
    vpl, kl_weight=1.0          0.48   0.53   0.50   0.51
    bradley_terry               0.50   0.54   0.54   0.52

With the weight 1 the latent is that of the prior, for all users. The model has one layer, and pairs do
not attend to each other: with three layers, or with attention between pairs, 150 to 400 updates from
random weights were not enough to leave an accuracy of one half.
"""

import dataclasses

from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.options import values


def get_config(text: str = ''):
  o = values(text, method='vpl', kl_weight=1e-4, seed=0, steps=150, smoke=False)
  made = {
    'bradley_terry': methods.bradley_terry(),
    'vpl': methods.vpl(context=4, latent=16, hidden=64, attention=False, kl_weight=o.kl_weight),
  }
  if o.method not in made:
    raise ValueError(f'option method: expected one of {sorted(made)}, got {o.method!r}')
  task = dataclasses.replace(tasks.tastes(), pairs_per_batch=32)
  model = presets.tiny(alphabet=task.alphabet)
  run = dict(learning_rate=1e-3, steps=o.steps, seed=o.seed, smoke=o.smoke)
  config = compose(made[o.method], task, model, **run)
  config.model.update(num_layers=1, width=64, num_heads=2, num_kv_heads=1, mlp_width=128)
  return config
