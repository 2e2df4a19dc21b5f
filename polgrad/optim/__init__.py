"""Optimizers, schedules and anchor rules.

An optimizer is an optax transformation that the learner calls as
`update(grads, state, params, oracle=oracle)`; `Oracle` says what it may ask besides the gradient.

| module | what is inside |
|---|---|
| `standard` | AdamW, Lion, Adafactor and gradient descent |
| `matrix_steps` | Muon, SinkGD and SWAN, which step by whole matrices, and the projection of norms |
| `variance_reduction` | optimizers for policy gradients, with less variance |
| `schedules` | multipliers of a learning rate or of a loss weight |
| `anchors` | rules by which named parameter sets follow the policy |
| `rank` | descent by rankings of candidates, and the loop that runs it |
| `companded` | weights that are a bounded function of what is trained |
| `smoothness` | second-order descent, damped by the norm of the gradient |
| `wrappers` | float32 master copies, masked entries, balance steps of routers, and the oracle |
"""

from typing import Annotated

import optax

from polgrad.optim.anchors import (
  ANCHORS,
  OF_POLICY,
  AnchorPart,
  blend,
  ema,
  fixed,
  rising_ema,
  slow_ema,
  slow_ema_of_peer,
  sync,
  sync_before,
)
from polgrad.optim.companded import companded
from polgrad.optim.matrix_steps import MATRIX, muon, projected, sinkgd, swan
from polgrad.optim.rank import rank_descent, rank_gradient, ranking
from polgrad.optim.schedules import (
  SCHEDULES,
  SchedulePart,
  constant,
  cosine,
  inverse_linear,
  linear,
  progressive,
  progressive_rest,
  rise_and_fall,
  rise_and_fall_rest,
  stairs,
  two_phase,
)
from polgrad.optim.smoothness import smooth_descent
from polgrad.optim.standard import STANDARD, adafactor, adamw, lion, masked, sgd
from polgrad.optim.variance_reduction import (
  bias_scaled,
  harpg,
  iterate,
  normalized_igt,
  signal_to_noise,
)
from polgrad.optim.wrappers import Oracle, balanced, in_float32, learning_rate
from polgrad.registry import table

TABLE = STANDARD | MATRIX
TABLE |= table('optim', normalized_igt, harpg, signal_to_noise, bias_scaled, smooth_descent, masked)
TABLE |= table('optim', companded)
Part = Annotated[optax.GradientTransformation, TABLE]

__all__ = [
  'ANCHORS',
  'OF_POLICY',
  'SCHEDULES',
  'TABLE',
  'AnchorPart',
  'Oracle',
  'Part',
  'SchedulePart',
  'adafactor',
  'adamw',
  'balanced',
  'bias_scaled',
  'blend',
  'companded',
  'constant',
  'cosine',
  'ema',
  'fixed',
  'harpg',
  'in_float32',
  'inverse_linear',
  'iterate',
  'learning_rate',
  'linear',
  'lion',
  'masked',
  'muon',
  'normalized_igt',
  'progressive',
  'progressive_rest',
  'projected',
  'rank_descent',
  'rank_gradient',
  'ranking',
  'rise_and_fall',
  'rise_and_fall_rest',
  'rising_ema',
  'sgd',
  'signal_to_noise',
  'sinkgd',
  'slow_ema',
  'slow_ema_of_peer',
  'smooth_descent',
  'stairs',
  'swan',
  'sync',
  'sync_before',
  'two_phase',
]
