"""Optimizers whose step depends on a weight as a matrix, and the projection of the norms of matrices.

Layers are stacked in one array, and so are experts, but each matrix is treated by itself. A matrix is
known by the name of its parameter (`KERNELS`), which also says which axes are its inputs. Embeddings,
norms, biases, routers and heads get AdamW's step, at the same learning rate.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.optim.schedules import SchedulePart, constant
from polgrad.optim.standard import STANDARD, matrices
from polgrad.optim.wrappers import clipped, in_float32, rated_like, scheduled
from polgrad.registry import AtLeastOne, Count, Decay, NotNegative, Positive, Range, table
from polgrad.types import Array, Params

# Name of a kernel, also of the factors of its adapter -> numbers of its input and of its output axes.
KERNELS = {'query': (1, 2), 'key': (1, 2), 'value': (1, 2), 'out': (2, 1)} | dict.fromkeys(
  ('gate', 'up', 'down'), (1, 1)
)
Clip = Annotated[float, Range(above=0)]


def kernel_axes(name: str) -> tuple[int, int] | None:
  """Numbers of input and output axes of a parameter; None if it is no kernel.

  They are the last axes of the array. Axes before them are of layers and experts.

  >>> kernel_axes('out'), kernel_axes('query_lora_b'), kernel_axes('embedding')
  ((2, 1), (1, 2), None)
  """
  base, adapter, half = name.partition('_lora_')
  if base not in KERNELS:
    return None
  inputs, outputs = KERNELS[base]
  if adapter:
    return (inputs, 1) if half == 'a' else (1, outputs)
  return inputs, outputs


def orthogonal(matrix: Array, *, steps: int = 5, polish: int = 0) -> Array:
  """The nearest matrix with orthonormal rows or columns, U V^T of G = U S V^T, by Newton-Schulz steps.

      X <- a X + b (X X^T) X + c (X X^T)^2 X,   X_0 = G / ||G||_F

  The coefficients 3.4445, -4.775, 2.0315 take small singular values quickly into about [0.7, 1.2], and
  no further. `polish` steps of the convergent coefficients 15/8, -10/8, 3/8 follow.

  Args:
    matrix: f32[..., n, m]; leading axes are of separate matrices. A zero matrix stays zero.
  """
  wide = matrix.shape[-2] <= matrix.shape[-1]
  x = matrix if wide else jnp.swapaxes(matrix, -1, -2)
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-12)
  for a, b, c in [(3.4445, -4.775, 2.0315)] * steps + [(15 / 8, -10 / 8, 3 / 8)] * polish:
    gram = x @ jnp.swapaxes(x, -1, -2)
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x if wide else jnp.swapaxes(x, -1, -2)


def sinkhorn(matrix: Array, *, rounds: int = 5, eps: float = 1e-8) -> Array:
  """Scales rows to the norm sqrt(m), then columns to sqrt(n), several times (arXiv:2502.06742).

  The squares of the result approach the doubly scaled squares of `matrix`, with row sums m and column
  sums n. So its entries have the root mean square 1, however long the gradient is.

  >>> sinkhorn(jnp.array([[2.0, -6.0], [1.0, -3.0]])).round(3).tolist()  # of rank one: the signs
  [[1.0, -1.0], [1.0, -1.0]]

  Args:
    matrix: f32[..., n, m].
    rounds: 0 returns the matrix unchanged.
    eps: is added to norms, so rows of zeros stay zeros.
  """
  for _ in range(rounds):
    for axis in (-1, -2):
      norms = jnp.linalg.norm(matrix, axis=axis, keepdims=True)
      matrix = matrix * math.sqrt(matrix.shape[axis]) / (norms + eps)
  return matrix


def whitened(matrix: Array, *, steps: int = 5, polish: int = 3, eps: float = 1e-8) -> Array:
  """SWAN's direction: R has rows of equal norm, and (R R^T)^(-1/2) R follows (arXiv:2412.13148).

  It is scaled to a root mean square of 1.

  Args:
    matrix: f32[..., n, m], where a row has the weights of one output.
    steps: see `orthogonal`, as `polish`.
  """
  norms = jnp.linalg.norm(matrix, axis=-1, keepdims=True)
  rows = matrix * math.sqrt(matrix.shape[-1]) / (norms + eps)
  return math.sqrt(max(matrix.shape[-2:])) * orthogonal(rows, steps=steps, polish=polish)


def muon(
  *,
  learning_rate: NotNegative = 1e-5,
  momentum: Decay = 0.95,
  nesterov: bool = True,
  steps: AtLeastOne = 5,
  rms: Positive = 0.2,
  b1: Decay = 0.9,
  b2: Decay = 0.95,
  eps: NotNegative = 1e-8,
  weight_decay: NotNegative = 0.0,
  max_grad_norm: Clip = 1.0,
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """Muon: the momentum of each matrix, orthogonalised (arXiv:2502.16982); AdamW for other parameters.

      W <- W - lr (rms sqrt(max(n, m)) orthogonal(momentum) + weight_decay W)

  With rms = 0.2 a step is about as long as one of AdamW, so learning rates of AdamW carry over.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    momentum: decay of the running mean of a matrix's gradient.
    nesterov: look one gradient ahead.
    steps: Newton-Schulz steps, see `orthogonal`.
    rms: root mean square of the entries of a step, divided by the learning rate.
    b1: of AdamW, for other parameters; so are `b2` and `eps`.
    weight_decay: of matrices and embeddings; norms, biases, the value head and adapters do not decay.
    max_grad_norm: a longer gradient is scaled to this norm.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.

  Confidence: CODE (optax.contrib.muon).
  """

  def dimensions(tree):
    def axes(path, x):
      inputs, outputs = kernel_axes(_name(path))
      first = x.ndim - inputs - outputs
      split = first + inputs
      return optax.contrib.MuonDimensionNumbers(
        tuple(range(first, split)), tuple(range(split, x.ndim))
      )

    return jax.tree_util.tree_map_with_path(axes, tree)

  def scaled(updates, params=None):
    del params
    return _each(lambda x: rms * math.sqrt(max(x.shape[-2:])) * x, updates)

  matrix = optax.chain(
    optax.contrib.scale_by_muon(
      ns_steps=steps,
      beta=momentum,
      nesterov=nesterov,
      mu_dtype=jnp.float32,
      weight_dimension_numbers=dimensions,
    ),
    optax.stateless(scaled),
  )
  return _finished(
    _by_kind('muon', matrix, optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32)),
    learning_rate,
    weight_decay,
    max_grad_norm,
    schedule,
    master_weights,
  )


def sinkgd(
  *,
  learning_rate: NotNegative = 1e-5,
  rounds: Count = 5,
  matrix_scale: Positive = 0.05,
  b1: Decay = 0.9,
  b2: Decay = 0.999,
  eps: NotNegative = 1e-8,
  weight_decay: NotNegative = 0.0,
  max_grad_norm: Clip = 1.0,
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """SinkGD: the gradient of each matrix, its rows and columns scaled (arXiv:2502.06742).

  The step of a matrix is `learning_rate * matrix_scale * sinkhorn(G)`, of other parameters AdamW's.
  Matrices need no state.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    rounds: see `sinkhorn`; 0 is gradient descent.
    matrix_scale: root mean square of the entries of a step of matrices, divided by the learning rate.
    b1: of AdamW, for other parameters; so are `b2` and `eps`.
    weight_decay: of matrices and embeddings; norms, biases, the value head and adapters do not decay.
    max_grad_norm: a longer gradient is scaled to this norm.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.

  Differences: implementations with unit norms have a step shorter by sqrt(n) for n rows; scale the rate.

  Confidence: CODE of third parties; `matrix_scale` and `rounds` PAPER.
  """

  def direction(grads, params=None):
    del params
    return _each(lambda g: matrix_scale * _turned(sinkhorn, g, rounds=rounds), grads)

  return _finished(
    _by_kind('sinkgd', optax.stateless(direction), optax.scale_by_adam(b1, b2, eps)),
    learning_rate,
    weight_decay,
    max_grad_norm,
    schedule,
    master_weights,
  )


def swan(
  *,
  learning_rate: NotNegative = 1e-5,
  matrix_scale: Positive = 0.05,
  b1: Decay = 0.9,
  b2: Decay = 0.999,
  eps: NotNegative = 1e-8,
  weight_decay: NotNegative = 0.0,
  max_grad_norm: Clip = 1.0,
  schedule: SchedulePart = constant,
  master_weights: bool = True,
) -> optax.GradientTransformation:
  """SWAN: the gradient of each matrix, rows normalised and then whitened (arXiv:2412.13148).

  The step of a matrix is `learning_rate * matrix_scale * whitened(G)`, of other parameters AdamW's.
  Matrices need no state.

  Args:
    learning_rate: is multiplied by `schedule(updates)`.
    matrix_scale: root mean square of the entries of a step of matrices, divided by the learning rate.
    b1: of AdamW, for other parameters; so are `b2` and `eps`.
    weight_decay: of matrices and embeddings; norms, biases, the value head and adapters do not decay.
    max_grad_norm: a longer gradient is scaled to this norm.
    master_weights: keep float32 copies of bfloat16 parameters, see `in_float32`.

  Confidence: CODE of third parties; the scale is ours, that of `sinkgd`.
  """

  def direction(grads, params=None):
    del params
    return _each(lambda g: matrix_scale * _turned(whitened, g), grads)

  return _finished(
    _by_kind('swan', optax.stateless(direction), optax.scale_by_adam(b1, b2, eps)),
    learning_rate,
    weight_decay,
    max_grad_norm,
    schedule,
    master_weights,
  )


class ProjectedState(NamedTuple):
  """State of `projected`."""

  inner: Any  # state of the optimizer
  norms: Params  # Frobenius norms of matrices at the start, f32[n]; MaskedNode for other parameters


STEPS = table('optim', muon, sinkgd, swan)
SteppedPart = Annotated[optax.GradientTransformation, STANDARD | STEPS]


def projected(*, optimizer: SteppedPart) -> optax.GradientTransformation:
  """Normalise and project: every matrix keeps its first Frobenius norm (NaP, arXiv:2407.01800).

      W <- (W + step) ||W_0||_F / ||W + step||_F

  A matrix before a normalisation does not change the function when it is scaled, but its gradient is
  divided by the scale. So growing norms lower the effective learning rate; projected ones do not,
  and it is then the schedule alone that lowers it. Each matrix of each layer is projected by itself.
  Moments of the optimizer, norms, biases and embeddings are left alone. Matrices that write to the
  residual stream (`out`, `down`) are projected too, where this does change the function.

  Args:
    optimizer: makes the steps.

  Raises:
    ValueError: from `init`, an adapter is trained, whose second factor begins with norm 0, or there is
      no matrix.

  Confidence: CODE of third parties; which parameters are projected is ours.
  """

  def norm(path, x):
    return jnp.linalg.norm(_seen(path, x), axis=(-2, -1)).astype(jnp.float32)

  def init(params):
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if adapters := sorted(n for n in paths if '_lora_' in n):
      raise ValueError(
        f'projected keeps norms, and adapters such as {adapters[0]} begin with norm 0'
      )
    if not any(map(kernel_axes, paths)):
      raise ValueError(f'projected finds none of the matrices {", ".join(KERNELS)}')
    keep = lambda path, x: norm(path, x) if kernel_axes(_name(path)) else optax.MaskedNode()
    return ProjectedState(optimizer.init(params), jax.tree_util.tree_map_with_path(keep, params))

  def update(grads, state, params, oracle=None):
    steps, inner = optax.with_extra_args_support(optimizer).update(
      grads, state.inner, params, oracle=oracle
    )

    def project(path, p, step, first):
      if not kernel_axes(_name(path)):
        return step
      moved = p + step
      scale = first / jnp.maximum(norm(path, moved), 1e-30)
      return (_seen(path, moved) * scale[:, None, None]).reshape(p.shape) - p

    steps = jax.tree_util.tree_map_with_path(project, params, steps, state.norms)
    return steps, ProjectedState(inner, state.norms)

  return rated_like(in_float32(optax.GradientTransformationExtraArgs(init, update)), optimizer)


MATRIX = STEPS | table('optim', projected)


def _name(path: tuple) -> str:
  return str(getattr(path[-1], 'key', '')) if path else ''


def _seen(path: tuple, x: Array) -> Array:
  """A kernel [..., inputs, outputs] as f[n, inputs, outputs], n matrices."""
  inputs, outputs = kernel_axes(_name(path))
  first = x.ndim - inputs - outputs
  if first < 0:
    raise ValueError(f'{_name(path)} has {x.ndim} axes, a kernel needs {inputs + outputs}')
  rows = math.prod(x.shape[first : first + inputs])
  return x.reshape(math.prod(x.shape[:first]), rows, math.prod(x.shape[first + inputs :]))


def _each(change: Callable[[Array], Array], tree: Params) -> Params:
  """Applies a function of [n, inputs, outputs] to every kernel of a tree that has kernels alone."""
  one = lambda path, x: change(_seen(path, x)).reshape(x.shape)
  return jax.tree_util.tree_map_with_path(one, tree)


def _turned(function: Callable, grads: Array, **settings) -> Array:
  """A function of matrices whose rows are outputs, applied to kernels, whose rows are inputs."""
  return jnp.swapaxes(function(jnp.swapaxes(grads, -1, -2), **settings), -1, -2)


def _by_kind(
  name: str, matrix: optax.GradientTransformation, rest: optax.GradientTransformation
) -> optax.GradientTransformation:
  """One transformation for kernels, another for all other parameters."""

  def labels(params):
    kind = lambda path, _: 'matrix' if kernel_axes(_name(path)) else 'rest'
    return jax.tree_util.tree_map_with_path(kind, params)

  parts = optax.partition({'matrix': matrix, 'rest': rest}, labels)

  def init(params):
    if 'matrix' not in jax.tree.leaves(labels(params)):
      raise ValueError(
        f'{name} finds none of the matrices {", ".join(KERNELS)} to train; use adamw'
      )
    return parts.init(params)

  return optax.GradientTransformation(init, parts.update)


def _finished(direction, learning_rate, weight_decay, max_grad_norm, schedule, master_weights):
  """Clipping before a direction, and decay, schedule and master copies after it."""
  transform = optax.chain(
    clipped(max_grad_norm),
    direction,
    optax.add_decayed_weights(weight_decay, mask=matrices),
    optax.scale_by_schedule(schedule),
    optax.scale(-learning_rate),
  )
  transform = in_float32(transform) if master_weights else transform
  return scheduled(transform, learning_rate, schedule)
