"""What stands around every optimizer: float32 master copies, balance steps, and the oracle."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from polgrad.types import Params


class Oracle(NamedTuple):
  """What an optimizer may ask about the loss of this update's batch, besides its gradient.

  All are functions, so that what is not asked for is not computed. Trees are like the parameters.
  """

  # (params, probe='') -> gradient of the loss at params; `probe` names a term that is no part of
  # the loss, whose gradient is given instead
  gradient: Callable
  halves: Callable  # () -> (g1, g2): gradients of the two halves of the batch, at the parameters
  product: Callable  # (vector) -> Hessian of the loss at the parameters times vector


class MasterState(NamedTuple):
  """Float32 copies of the parameters of lower precision (nothing for the others), and the rest."""

  master: Params
  inner: Any


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Runs an optimizer on float32 master copies of parameters that are stored in bfloat16.

  A bfloat16 number has 8 bits, so a step below 1/256 of it would be lost, and most steps are. The
  step is made on the master copy in float32, moments included, and the parameter is the copy,
  rounded. Float32 parameters are their own master copies: nothing is kept for them, and wrapping
  twice is the same as once. What an oracle says is about the rounded parameters, in float32.
  """
  optimizer = optax.with_extra_args_support(optimizer)
  low = lambda p: jnp.finfo(p.dtype).bits < 32
  single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32) if low(x) else x, tree)

  def init(params):
    keep = lambda p: p.astype(jnp.float32) if low(p) else optax.MaskedNode()
    return MasterState(jax.tree.map(keep, params), optimizer.init(single(params)))

  def update(grads, state, params, oracle=None):
    stored = lambda tree: jax.tree.map(lambda p, x: x.astype(p.dtype), params, tree)
    if oracle is not None:
      oracle = _seen_through(oracle, point=stored, direction=stored, answer=single)
    masters = jax.tree.map(lambda p, m: m if low(p) else p, params, state.master)
    steps, inner = optimizer.update(single(grads), state.inner, masters, oracle=oracle)
    moved = optax.apply_updates(masters, steps)
    # The difference of two bfloat16 numbers in float32, so that adding it gives the rounded copy.
    rounded = lambda p, m: m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32)
    steps = jax.tree.map(lambda p, m, s: rounded(p, m) if low(p) else s, params, moved, steps)
    keep = lambda p, m: m if low(p) else optax.MaskedNode()
    return steps, MasterState(jax.tree.map(keep, params, moved), inner)

  return optax.GradientTransformationExtraArgs(init, update)


def balanced(
  optimizer: optax.GradientTransformation, labels: Callable[[Params], Params], *, rate: float
) -> optax.GradientTransformation:
  """Sign steps of size `rate` on what is labelled 'balance', the optimizer on what is 'train'.

  The gradient of a router's bias is the excess load of its experts; see `models/experts.py`.
  """
  if not rate:
    return optimizer
  parts = optax.partition({'train': optimizer, 'balance': optax.sign_sgd(rate)}, labels)

  def update(grads, state, params, oracle=None):
    if oracle is not None:
      names = labels(params)
      trained = lambda x, name: x if name == 'train' else optax.MaskedNode()
      # A gradient is taken at the whole parameters; a direction does not move the balance.
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

  return optax.GradientTransformationExtraArgs(parts.init, update)


def _seen_through(
  oracle: Oracle, *, point: Callable, direction: Callable, answer: Callable
) -> Oracle:
  """The oracle of a wrapped optimizer: questions are mapped on their way in, answers back."""
  return Oracle(
    gradient=lambda params, probe='': answer(oracle.gradient(point(params), probe)),
    halves=lambda: tuple(answer(g) for g in oracle.halves()),
    product=lambda vector: answer(oracle.product(direction(vector))),
  )
