"""Variational preference learning (arXiv:2408.10075) of users with opposite tastes, on a model that is
trained from scratch.

Half of eight users prefer warm colours, the others cold ones. A reward model that gives every completion
one score is right about half of the pairs, whatever it learns. `methods.vpl` reads four other pairs of
the user who labelled a pair, and finds the taste in them. Options: method (vpl or
bradley_terry), kl_weight, seed, steps, smoke.

    python -m polgrad.train --config=experiments/tastes.py --workdir=runs/tastes
    python -m polgrad.train --config=experiments/tastes.py:method=bradley_terry --workdir=runs/one_taste

MEASURED
"""

from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.options import values


def get_config(text: str = ''):
  o = values(text, method='vpl', kl_weight=1e-3, seed=0, steps=400, smoke=False)
  made = {
    'bradley_terry': methods.bradley_terry(),
    'vpl': methods.vpl(context=4, latent=8, hidden=64, kl_weight=o.kl_weight),
  }
  if o.method not in made:
    raise ValueError(f'option method: expected one of {sorted(made)}, got {o.method!r}')
  task = tasks.tastes()
  model = presets.tiny(alphabet=task.alphabet)
  run = dict(learning_rate=1e-3, steps=o.steps, seed=o.seed, smoke=o.smoke)
  return compose(made[o.method], task, model, **run)
