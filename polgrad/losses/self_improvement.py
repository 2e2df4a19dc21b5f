"""SRPO: a policy that improves its own answers, learned offline (arXiv:2406.01660).

One network plays two parts: the generator pi(y1 | x), and the reviser pi'(y2 | y1, x), whose prompt also
has an answer y1, which it is to improve. The generator minimises, and the reviser maximises,

    E[P(y2 > y1) - beta KL(pi' || reference) + beta KL(pi || reference)],    y1 ~ pi,  y2 ~ pi'(. | y1).

The solution does not depend on who wrote the pairs that it is learned from. A pair is a preferred
completion w and another one l. The functions take six summed log-ratios to the reference:

    u_w      log pi(w | x) / reference(w | x),              and u_l
    a_wl     log pi'(w | l, x) / reference(w | l, x),       and a_lw, a_ww, a_ll

The first letter after `a_` is the revision, the second one the answer that it revises.
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

  At the optimum U(y) - A(y | y) is the same for all answers y of a prompt, U being the log-ratio of the
  generator and A that of the reviser. The gradient flows through both.

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
    alpha: weight of the reviser's loss, in [0, 1].

  Returns:
    [...].
  """
  robust = robustness(u_w, u_l, a_ww, a_ll, beta=beta)
  return (1 - alpha) * robust + alpha * improvement(a_wl, a_ll, a_lw, a_ww, beta=beta)
