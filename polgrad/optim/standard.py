"""AdamW, Lion, Adafactor and gradient descent, composed of optax transformations."""

import pathlib
import re
import zipfile
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad.optim.schedules import SchedulePart, constant
from polgrad.optim.wrappers import (
  clipped,
  in_float32,
  partial_update,
  rated_like,
  scheduled,
  skipping,
  subnetwork,
)
from polgrad.registry import AtLeastOne, Decay, NotNegative, Positive, Range, table


def adamw(
  *,
  learning_rate: NotNegative = 1e-6,
  b1: Decay = 0.9,
  b2: Decay = 0.999,
  eps: NotNegative = 1e-8,
  weight_decay: NotNegative = 0.0,
  decay: Literal['matrices', 'all'] = 'matrices',
  max_grad_norm: Annotated[float, Range(above=0)] = 1.0,
  skip_grad_norm: Annotated[float, Range(above=0)] = float('inf'),
  schedule: SchedulePart = constant,
  master_weights: bool = True,
  only: str = '',
) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101), on a gradient that is clipped by its global norm.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    b1: decay of the running mean of the gradient.
    b2: decay of the running mean of its square.
    eps: is added to the root of that mean.
    weight_decay: fraction of a parameter that is subtracted, times learning rate and schedule.
    decay: which parameters decay: 'matrices' leaves out norms, biases, the value head and the factors of
      adapters, by their names; 'all' leaves out none.
    max_grad_norm: a longer gradient is scaled to this norm.
    skip_grad_norm: a longer gradient changes neither parameters nor moments; the default skips none.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.
    only: regular expression; only parameters in whose name it is found are updated, such as
      `value_head$`. Empty updates all that the model trains.
  """
  transform = optax.chain(
    clipped(max_grad_norm),
    optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32),
    optax.add_decayed_weights(weight_decay, mask=None if decay == 'all' else matrices),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  if skip_grad_norm < float('inf'):
    transform = skipping(transform, limit=skip_grad_norm)
  transform = in_float32(transform) if master_weights else transform
  transform = partial_update(transform, names=only) if only else transform
  return scheduled(transform, learning_rate, schedule)


def matrices(params: Any) -> Any:
  """The same tree with False for parameters that should not decay, and True for all others.

  These are scales of norms, biases, the value head, and the factors of adapters, which begin near 0.
  """
  name = lambda path: str(getattr(path[-1], 'key', '')) if path else ''
  kept = re.compile(r'norm$|bias$|^value_head$|_lora_[ab]$')
  return jax.tree_util.tree_map_with_path(lambda path, _: not kept.search(name(path)), params)


def sgd(
  *,
  learning_rate: NotNegative = 1e-3,
  momentum: Decay = 0.0,
  max_grad_norm: Annotated[float, Range(above=0)] = float('inf'),
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """Gradient descent.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    momentum: decay of heavy-ball momentum; 0 is none.
    max_grad_norm: a longer gradient is scaled to this norm; the default does not clip.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.
  """
  transform = optax.chain(
    clipped(max_grad_norm),
    optax.trace(momentum),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  transform = in_float32(transform) if master_weights else transform
  return scheduled(transform, learning_rate, schedule)


def lion(
  *,
  learning_rate: NotNegative = 1e-7,
  b1: Decay = 0.9,
  b2: Decay = 0.99,
  weight_decay: NotNegative = 0.0,
  max_grad_norm: Annotated[float, Range(above=0)] = 1.0,
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """Lion: the sign of a momentum, which is the only state (arXiv:2302.06675).

      step = -lr (sign(b1 m + (1 - b1) g) + weight_decay W),   m <- b2 m + (1 - b2) g

  Every entry moves by the learning rate, so it should be 3 to 10 times lower than AdamW's, and the
  weight decay higher by the same factor.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    b1: weight of the momentum in the step.
    b2: decay of the momentum.
    weight_decay: as of `adamw` with decay='matrices'.
    max_grad_norm: a longer gradient is scaled to this norm.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.

  Confidence: CODE (optax).
  """
  transform = optax.chain(
    clipped(max_grad_norm),
    optax.scale_by_lion(b1, b2, mu_dtype=jnp.float32),
    optax.add_decayed_weights(weight_decay, mask=matrices),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  transform = in_float32(transform) if master_weights else transform
  return scheduled(transform, learning_rate, schedule)


def adafactor(
  *,
  learning_rate: NotNegative = 1e-6,
  decay_exponent: NotNegative = 0.8,
  clip: Positive = 1.0,
  least_factored: AtLeastOne = 128,
  relative: bool = False,
  weight_decay: NotNegative = 0.0,
  max_grad_norm: Annotated[float, Range(above=0)] = float('inf'),
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """Adafactor without momentum: mean squares of gradients, kept by rows and columns (arXiv:1804.04235).

      u = g / sqrt(v),   step = -lr (u / max(1, rms(u) / clip) + weight_decay W)

  v is the outer product of the row and column means of g^2, over the two longest axes of an array; its
  decay after t updates is 1 - t^-decay_exponent. All layers of a stack are one array: each
  has rows and columns by itself, but `clip` and `relative` take one mean over all of them.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    clip: greatest root mean square of u in one array.
    least_factored: arrays whose second longest axis is shorter keep v whole.
    relative: multiply steps by max(rms(W), 0.001), as in the paper, so that a rate is relative.
    weight_decay: as of `adamw` with decay='matrices'.
    max_grad_norm: a longer gradient is scaled to this norm; the default does not clip.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.

  Confidence: CODE (optax).
  """
  transform = optax.chain(
    clipped(max_grad_norm),
    optax.scale_by_factored_rms(decay_rate=decay_exponent, min_dim_size_to_factor=least_factored),
    optax.clip_by_block_rms(clip),
    optax.scale_by_param_block_rms() if relative else optax.identity(),
    optax.add_decayed_weights(weight_decay, mask=matrices),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  transform = in_float32(transform) if master_weights else transform
  return scheduled(transform, learning_rate, schedule)


STANDARD = table('optim', adamw, sgd, lion, adafactor)
StandardPart = Annotated[optax.GradientTransformation, STANDARD]


def masked(*, optimizer: StandardPart, mask: str) -> optax.GradientTransformation:
  """Subnetwork training: only entries that another run has changed are trained (arXiv:2505.11711).

  Args:
    optimizer: makes the steps; it sees a gradient of 0 elsewhere.
    mask: file of `polgrad.update_sparsity --mask`, which says what that run has changed.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no file of masks; from `init`, it lacks a parameter, or has another shape of it.
  """
  if not pathlib.Path(mask).is_file():
    raise FileNotFoundError(f'masked: there is no file {mask!r}')
  if not zipfile.is_zipfile(mask):
    raise ValueError(f'masked: {mask!r} is damaged, or no file of polgrad.update_sparsity --mask')

  def find(name, shape):
    with np.load(mask) as stored:
      if name not in stored:
        raise ValueError(f'{mask}: no mask of {name}, only {sorted(stored)[:8]}')
      found = stored[name]
    if found.shape != shape or found.dtype != bool:
      raise ValueError(f'{mask}: {name} is {found.dtype}{found.shape}, expected bool{shape}')
    return found

  return rated_like(subnetwork(optimizer, find), optimizer)
