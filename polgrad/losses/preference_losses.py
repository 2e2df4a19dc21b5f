"""Losses of a preference pair, computed from its margin.

A function of `TABLE` fills the slot `link` of `objectives.Pairwise`. The margin is
z = beta (score of the chosen row - score of the rejected row) - offset. The label p is the
probability that the chosen row is the better one; it is a constant. Each function combines a link l,
a function of the margin, with the label as

    p l(z) + (1 - p) l(-z).

p = 1 is plain DPO, p = 1 - eps is conservative DPO. p = (1 - eps)/(1 - 2 eps) > 1 is robust DPO
(arXiv:2403.00409), so labels may lie outside [0, 1].

The examples need `import jax.numpy as jnp, numpy as np` and
`from polgrad.losses import preference_losses`.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def logistic(margin: Array, label: Array) -> Array:
  """l(z) = log(1 + exp(-z)): Bradley-Terry, DPO (arXiv:2305.18290).

  The minimiser is z = log(p / (1 - p)) for p in (0, 1).

  Args:
    margin: [...], z.
    label: [...], p.

  Returns:
    [...].

  >>> loss = preference_losses.logistic(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [0.693 0.127]
  """
  chex.assert_equal_shape([margin, label])
  return label * jax.nn.softplus(-margin) + (1 - label) * jax.nn.softplus(margin)


def squared(margin: Array, label: Array, *, target: float = 1.0) -> Array:
  """l(z) = (target - z)^2: IPO (arXiv:2310.12036).

  IPO with temperature tau, on a margin h of log-ratios, is z = h with target = 1/(2 tau). Equivalently,
  z = 2 tau h with target = 1 gives 4 tau^2 times that loss. The minimiser is z = (2 p - 1) target. IPO
  sums the log-ratios of tokens; some code bases average them.

  Args:
    margin: [...], z.
    label: [...], p.
    target: the margin at which a pair with p = 1 has loss 0.

  Returns:
    [...].

  >>> loss = preference_losses.squared(jnp.array([0.0, 3.0]), jnp.array([1.0, 1.0]), target=2.0)
  >>> print(np.asarray(loss).round(2))
  [4. 1.]
  """
  chex.assert_equal_shape([margin, label])
  return label * jnp.square(target - margin) + (1 - label) * jnp.square(target + margin)


def hinge(margin: Array, label: Array, *, threshold: float = 1.0) -> Array:
  """l(z) = max(0, threshold - z): SLiC-HF (arXiv:2305.10425).

  Args:
    margin: [...], z.
    label: [...], p.
    threshold: the margin from which on a pair with p = 1 has loss 0 and gradient 0.

  Returns:
    [...].

  >>> loss = preference_losses.hinge(jnp.array([0.25, 2.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(2))
  [0.75 0.  ]
  """
  chex.assert_equal_shape([margin, label])
  return label * jax.nn.relu(threshold - margin) + (1 - label) * jax.nn.relu(threshold + margin)


TABLE = table('preference_losses', logistic, squared, hinge)
Part = Annotated[Callable, TABLE]
