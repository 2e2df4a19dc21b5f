"""SRPO: a policy that improves its own answers, learned offline (arXiv:2406.01660).

One network plays two parts: the generator pi(y | x), and the reviser pi'(y2 | y1, x), which is asked
again with an answer y1 in its prompt. The objective is the reviser's best gain over the generator's
worst case,

    min over pi, max over pi' of E[P(y2 > y1) - beta KL(pi' || reference) + beta KL(pi || reference)].

Its solution does not depend on who wrote the pairs that it is learned from. The functions take six
summed log-ratios to the reference for every pair of a preferred completion w and another one l. In

    u_w      log pi(w | x) / reference(w | x)
    a_wl     log pi'(w | l, x) / reference(w | l, x)        the revision of l is w

the letters after `a_` are the answer and what it revises; u_l, a_lw, a_ww and a_ll are alike.
"""

import chex
import jax.numpy as jnp

from polgrad.types import Array


def improvement(a_wl: Array, a_ll: Array, a_lw: Array, a_ww: Array, *, beta: float) -> Array:
  """(1/2 - beta (a_wl - a_ll))^2 + (-1/2 - beta (a_lw - a_ww))^2: the loss of the reviser
  (arXiv:2406.01660).

  Its minimiser over pairs whose winner is drawn with the probability P has
  P(y2 > y1) = 1/2 + beta (A(y2 | y1) - A(y1 | y1)), whichever distribution the pairs are from.

  Args:
    a_wl, a_ll, a_lw, a_ww: [...], nats.
    beta: coefficient of both KLs.

  Returns:
    [...].
  """
  chex.assert_equal_shape([a_wl, a_ll, a_lw, a_ww])
  better = 0.5 - beta * (a_wl - a_ll)
  worse = -0.5 - beta * (a_lw - a_ww)
  return jnp.square(better) + jnp.square(worse)


def robustness(u_w: Array, u_l: Array, a_ww: Array, a_ll: Array, *, beta: float) -> Array:
  """beta^2 ((u_w - a_ww) - (u_l - a_ll))^2: the loss that ties the generator to the reviser
  (arXiv:2406.01660).

  At the optimum U(y) - A(y | y) is the same for all answers of a prompt. Gradient flows through both
  parts.

  Args:
    u_w, u_l, a_ww, a_ll: [...], nats.
    beta: coefficient of both KLs.

  Returns:
    [...].
  """
  chex.assert_equal_shape([u_w, u_l, a_ww, a_ll])
  return jnp.square(beta * ((u_w - a_ww) - (u_l - a_ll)))


def srpo(
  u_w: Array,
  u_l: Array,
  a_wl: Array,
  a_ll: Array,
  a_lw: Array,
  a_ww: Array,
  *,
  beta: float = 0.01,
  alpha: float = 0.5,
) -> Array:
  """(1 - alpha) `robustness` + alpha `improvement`: SRPO (arXiv:2406.01660).

  Args:
    u_w, u_l: [...], nats, of the generator.
    a_wl, a_ll, a_lw, a_ww: [...], nats, of the reviser.
    beta: coefficient of both KLs.
    alpha: share of the reviser's loss, in [0, 1].

  Returns:
    [...].
  """
  robust = robustness(u_w, u_l, a_ww, a_ll, beta=beta)
  return (1 - alpha) * robust + alpha * improvement(a_wl, a_ll, a_lw, a_ww, beta=beta)
