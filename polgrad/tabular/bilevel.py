"""The gradient of an outer loss through the solution of an inner problem, as PARL needs it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from polgrad.types import Array, Params


def hypergradient(
  upper: Callable[[Params, Params], Array],
  lower: Callable[[Params, Params], Array],
  solve: Callable[[Params], Params],
  *,
  damping: float = 0.0,
) -> Callable[[Params], tuple[Array, Params]]:
  """The value and gradient of upper(nu, theta*(nu)), theta*(nu) = argmax of lower(nu, .).

      d/dnu = d upper / dnu  -  (d^2 lower / dnu dtheta) (d^2 lower / dtheta^2)^-1 d upper / dtheta

  In PARL (arXiv:2308.02585) nu are the parameters of a reward model, theta those of the policy that
  maximises it, and the outer loss is that of preferences of trajectories which this policy samples.
  Usual reinforcement learning from feedback updates the reward with the first term alone: it ignores
  that another reward makes another policy, which samples other data.

  The inverse is applied by conjugate gradients with Hessian-vector products, so no matrix is stored.
  Directions that do not change `lower`, such as a constant added to logits, are no obstacle if they do
  not change `upper` either.

  Confidence: DERIVED (implicit function theorem); the algorithm's constants are not public.

  Args:
    upper: (nu, theta) -> loss f32[], to be minimised.
    lower: (nu, theta) -> value f32[], which `solve` maximises; concave near the maximum.
    solve: nu -> theta, to high precision: the error of the gradient is proportional to its error.
    damping: delta >= 0; -H + delta I is inverted in place of -H. Above 0 for inexact solutions.

  Returns:
    nu -> (value f32[], gradient shaped like nu).
  """

  def value_and_gradient(nu: Params) -> tuple[Array, Params]:
    theta = jax.lax.stop_gradient(solve(nu))
    value, (direct, by_theta) = jax.value_and_grad(upper, argnums=(0, 1))(nu, theta)
    slope = jax.grad(lower, argnums=1)

    # Curvature of -lower at the solution, as a product with a vector.
    def curvature(vector):
      product = jax.jvp(lambda t: slope(nu, t), (theta,), (vector,))[1]
      return jax.tree.map(lambda h, v: damping * v - h, product, vector)

    flat, unravel = ravel_pytree(by_theta)
    matrix = lambda x: ravel_pytree(curvature(unravel(x)))[0]
    adjoint, _ = jax.scipy.sparse.linalg.cg(matrix, flat, tol=1e-12, maxiter=4 * flat.size)
    # How the slope of `lower` changes with nu, seen along the adjoint.
    along = lambda n: sum(
      jnp.vdot(a, b)
      for a, b in zip(jax.tree.leaves(slope(n, theta)), jax.tree.leaves(unravel(adjoint)))
    )
    return value, jax.tree.map(jnp.add, direct, jax.grad(along)(nu))

  return value_and_gradient
