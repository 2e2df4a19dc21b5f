"""What surrounds every optimizer: float32 master copies, balance steps, and the oracle."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.types import Params


class Oracle(NamedTuple):
  """What an optimizer may ask about the loss of this update's minibatch, besides its gradient.

  Each field is a function, so only what is asked for is computed. Gradients and vectors are trees like
  the parameters that the optimizer gets. The minibatch has B rows.
  """

  # (params, probe='') -> gradient at `params`, of the loss or of the objective's probe of that name.
  gradient: Callable
  # () -> (g1, g2), gradients at the current parameters of the loss of the first B // 2 rows, and of the
  # loss of the others. Each half has its own counts and selections, and is cut into as many
  # micro-batches as the minibatch. The rows of a group (samples of one prompt) are consecutive, so at
  # most one group has rows in both halves, the one in the middle: none if the first half ends with a
  # group. A prompt that was drawn twice is two groups, which may be in different halves.
  halves: Callable
  # (vector) -> the Hessian of the loss at the current parameters, times the vector.
  product: Callable
  # () -> the loss at the current parameters, f32[], which the update has already.
  value: Callable | None = None
  # (params) -> (loss f32[], gradient) at `params`, in one pass.
  value_and_gradient: Callable | None = None


class Rated(optax.GradientTransformationExtraArgs):
  """An optimizer that tells its learning rate.

  Attributes:
    rate: (state of this optimizer, also within wrappers) -> f32[], the rate of the next step.
  """

  rate: Callable[[Any], jax.Array]


def rated_like(
  optimizer: optax.GradientTransformation, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The optimizer with the learning rate of the one that it wraps, if that tells one."""
  return rated(optimizer, inner.rate) if isinstance(inner, Rated) else optimizer


def rated(optimizer: optax.GradientTransformation, rate: Callable[[Any], jax.Array]) -> Rated:
  """The optimizer with its learning rate, see `Rated`."""
  optimizer = optax.with_extra_args_support(optimizer)
  made = Rated(optimizer.init, optimizer.update)
  made.rate = rate
  return made


def scheduled(
  optimizer: optax.GradientTransformation,
  learning_rate: float,
  schedule: Callable[[jax.Array], jax.Array],
  counter: type = optax.ScaleByScheduleState,
) -> Rated:
  """An optimizer whose rate is `learning_rate * schedule(count)`.

  Args:
    counter: type of the state that holds `count`, the updates that the optimizer has made.
  """
  counts = lambda x: isinstance(x, counter)

  def rate(state):
    [found] = [x for x in jax.tree.leaves(state, is_leaf=counts) if counts(x)]
    return learning_rate * schedule(found.count)

  return rated(optimizer, rate)


def learning_rate(optimizer: optax.GradientTransformation, state: Any) -> dict[str, jax.Array]:
  """The metric `learning_rate` of the next step; {} if the optimizer does not tell it."""
  return {'learning_rate': optimizer.rate(state)} if isinstance(optimizer, Rated) else {}


class MasterState(NamedTuple):
  """State of `in_float32`."""

  master: Params  # float32 copies of the parameters of lower precision, MaskedNode for the others
  inner: Any  # state of the optimizer


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Runs an optimizer on float32 master copies of the parameters that are stored in bfloat16.

  A bfloat16 number has 8 significant bits, so adding a step below 1/256 of it would change nothing,
  and most steps are smaller. The optimizer therefore steps on float32 copies, with float32 moments,
  and the parameters are these copies, rounded. Nothing is kept for float32 parameters, so wrapping
  twice is the same as once. Oracles evaluate the rounded parameters, and their answers are float32.
  """
  optimizer = optax.with_extra_args_support(optimizer)
  low = lambda p: jnp.finfo(p.dtype).bits < 32
  single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32) if low(x) else x, tree)

  def init(params):
    keep = lambda p: p.astype(jnp.float32) if low(p) else optax.MaskedNode()
    return MasterState(jax.tree.map(keep, params), optimizer.init(single(params)))

  def update(grads, state, params, oracle=None):
    # The optimizer gets everything in float32: gradients, parameters and the oracle's answers.
    stored = lambda tree: jax.tree.map(lambda p, x: x.astype(p.dtype), params, tree)
    if oracle is not None:
      oracle = _seen_through(oracle, point=stored, direction=stored, answer=single)
    masters = jax.tree.map(lambda p, m: m if low(p) else p, params, state.master)
    steps, inner = optimizer.update(single(grads), state.inner, masters, oracle=oracle)
    moved = optax.apply_updates(masters, steps)
    # A bfloat16 parameter steps to its rounded copy: the float32 difference of two bfloat16 numbers,
    # which added to the parameter gives the copy exactly.
    rounded = lambda p, m: m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32)
    steps = jax.tree.map(lambda p, m, s: rounded(p, m) if low(p) else s, params, moved, steps)
    keep = lambda p, m: m if low(p) else optax.MaskedNode()
    return steps, MasterState(jax.tree.map(keep, params, moved), inner)

  return optax.GradientTransformationExtraArgs(init, update)


def clipped(limit: float) -> optax.GradientTransformation:
  """Scales a gradient whose global norm exceeds the limit, so that its norm is the limit.

  `optax.clip_by_global_norm` divides every entry by the norm, and both moments and the step read the
  result, so XLA stores a clipped copy. Here entries are multiplied by one factor where they are read.

  >>> step, _ = clipped(1.0).update({'w': jnp.array([3.0, 4.0])}, optax.EmptyState())
  >>> step['w'].tolist()
  [0.6000000238418579, 0.800000011920929]
  """

  def update(grads, state, params=None):
    del params
    norm = optax.tree.norm(grads)
    factor = jnp.where(norm < limit, 1.0, limit / norm)
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def skipping(
  optimizer: optax.GradientTransformation, *, limit: float
) -> optax.GradientTransformation:
  """Makes no step, and leaves the optimizer's state unchanged, where the gradient is too long.

  Args:
    limit: largest norm of a gradient that is used.
  """

  def update(grads, state, params=None):
    used = optax.tree.norm(grads) <= limit
    steps, moved = optimizer.update(grads, state, params)
    steps = jax.tree.map(lambda s: jnp.where(used, s, 0), steps)
    return steps, jax.tree.map(lambda new, old: jnp.where(used, new, old), moved, state)

  return optax.GradientTransformation(optimizer.init, update)


def partial_update(
  optimizer: optax.GradientTransformation, *, names: str
) -> optax.GradientTransformation:
  """Updates only some parameters; the others keep their values, and their gradients are not seen.

  So a clipping of the gradient by its norm sees the norm of these parameters alone.

  Args:
    names: regular expression that is searched for in the last part of a parameter's name, such as
      `value_head$`.

  Raises:
    ValueError: from `init`, no parameter has such a name.
  """
  pattern = re.compile(names)

  def labels(params):
    name = lambda path: str(getattr(path[-1], 'key', '')) if path else ''
    label = lambda path, _: 'moved' if pattern.search(name(path)) else 'kept'
    return jax.tree_util.tree_map_with_path(label, params)

  parts = optax.partition({'moved': optimizer, 'kept': optax.set_to_zero()}, labels)

  def init(params):
    if 'moved' not in jax.tree.leaves(labels(params)):
      raise ValueError(f'no parameter that is trained has a name with {names!r}')
    return parts.init(params)

  return optax.GradientTransformationExtraArgs(init, parts.update)


def path_name(path: tuple) -> str:
  """The keys of a parameter's path with `/` between them."""
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


class SubnetworkState(NamedTuple):
  """State of `subnetwork`."""

  mask: Params  # bool, like the parameters
  inner: Any  # state of the optimizer


def subnetwork(
  optimizer: optax.GradientTransformation, masks: Callable[[str, tuple[int, ...]], Any]
) -> optax.GradientTransformation:
  """Trains only some entries of each parameter: gradients and steps of the others are 0.

  So weight decay and momentum leave them alone too. A mask of ones alone changes nothing.

  Args:
    masks: (name of a parameter with `/` between its keys, shape) -> bool array of this shape, True for
      entries that are trained. It is called in `init`, and the masks are part of the state.
  """
  optimizer = optax.with_extra_args_support(optimizer)
  only = lambda mask, tree: jax.tree.map(
    lambda m, x: jnp.where(m, x, jnp.zeros_like(x)), mask, tree
  )

  def init(params):
    find = lambda path, x: jnp.asarray(masks(path_name(path), x.shape), bool)
    return SubnetworkState(jax.tree_util.tree_map_with_path(find, params), optimizer.init(params))

  def update(grads, state, params=None, **more):
    steps, inner = optimizer.update(only(state.mask, grads), state.inner, params, **more)
    return only(state.mask, steps), state._replace(inner=inner)

  return optax.GradientTransformationExtraArgs(init, update)


def balanced(
  optimizer: optax.GradientTransformation, labels: Callable[[Params], Params], *, rate: float
) -> optax.GradientTransformation:
  """Balances routers: the optimizer updates parameters labelled 'train', sign steps those of 'balance'.

  The "gradient" of a router's bias is the excess load of its experts, see `models/experts.py`.

  Args:
    labels: params -> the same tree with a label for each array, see `Policy.labels`.
    rate: size of the sign steps; 0 returns the optimizer unchanged.
  """
  if not rate:
    return optimizer
  parts = optax.partition({'train': optimizer, 'balance': optax.sign_sgd(rate)}, labels)

  def update(grads, state, params, oracle=None):
    if oracle is not None:
      names = labels(params)
      trained = lambda x, name: x if name == 'train' else optax.MaskedNode()
      # The optimizer knows only trained parameters. In its questions the others are filled in: with
      # their values in a point, and with zeros in a direction. In the answers they are left out.
      whole = lambda rest, tree: jax.tree.map(
        lambda name, r, x: x if name == 'train' else r, names, rest, tree
      )
      oracle = _seen_through(
        oracle,
        point=lambda tree: whole(params, tree),
        direction=lambda tree: whole(jax.tree.map(jnp.zeros_like, params), tree),
        answer=lambda tree: jax.tree.map(trained, tree, names),
      )
    return parts.update(grads, state, params, oracle=oracle)

  return rated_like(optax.GradientTransformationExtraArgs(parts.init, update), optimizer)


def _seen_through(
  oracle: Oracle, *, point: Callable, direction: Callable, answer: Callable
) -> Oracle:
  """The oracle that a wrapper gives to its optimizer.

  Args:
    point: maps parameters in a question to those of the outer oracle.
    direction: maps a vector in a question likewise.
    answer: maps each gradient or product of the outer oracle back.
  """

  def both(params):
    value, gradient = oracle.value_and_gradient(point(params))
    return value, answer(gradient)

  return Oracle(
    value=oracle.value,
    value_and_gradient=both,
    gradient=lambda params, probe='': answer(oracle.gradient(point(params), probe)),
    halves=lambda: tuple(answer(g) for g in oracle.halves()),
    product=lambda vector: answer(oracle.product(direction(vector))),
  )
