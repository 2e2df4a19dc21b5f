"""Losses of a preference pair, computed from its margin.

A function of `TABLE` fills the slot `link` of `objectives.Pairwise`. The margin is
z = beta (score of the chosen row - score of the rejected row) - offset. The label p is the
probability that the chosen row is the better one; it is a constant. Each function but `reverse_kl`
combines a link l, a function of the margin, with the label as

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

from polgrad.losses._common import bounded
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


def exponential(margin: Array, label: Array) -> Array:
  """l(z) = exp(-z): a convex link of GPO (arXiv:2402.05749).

  Args:
    margin: [...], z; clamped to +-20 nats, beyond which it has no gradient.
    label: [...], p.

  Returns:
    [...].

  >>> loss = preference_losses.exponential(jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [1.    0.368]
  """
  return _soft(lambda z: jnp.exp(-bounded(z)), margin, label)


def truncated_square(margin: Array, label: Array) -> Array:
  """l(z) = max(0, 1 - z)^2: a convex link of GPO, the square that leaves large margins alone
  (arXiv:2402.05749).

  Args:
    margin: [...], z.
    label: [...], p.

  Returns:
    [...].

  >>> loss = preference_losses.truncated_square(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [0.25 0.  ]
  """
  return _soft(lambda z: jnp.square(jax.nn.relu(1 - z)), margin, label)


def savage(margin: Array, label: Array) -> Array:
  """l(z) = sigmoid(-z)^2: the Savage loss, a link of GPO that is bounded and not convex
  (arXiv:2402.05749).

  Args:
    margin: [...], z.
    label: [...], p.

  Returns:
    [...].

  >>> loss = preference_losses.savage(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [0.25  0.014]
  """
  return _soft(lambda z: jnp.square(jax.nn.sigmoid(-z)), margin, label)


def sigmoid(margin: Array, label: Array) -> Array:
  """l(z) = sigmoid(-z): a smooth 0-1 loss, bounded and not convex (arXiv:2402.05749).

  Args:
    margin: [...], z.
    label: [...], p.

  Returns:
    [...].

  >>> loss = preference_losses.sigmoid(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [0.5   0.119]
  """
  return _soft(lambda z: jax.nn.sigmoid(-z), margin, label)


def modulated(margin: Array, label: Array, *, temperature: float = 0.05) -> Array:
  """l(z) = (1 - m) log(1 + exp(-z)) + m exp(-z), m = sigmoid(z / temperature): the log-ratio modulated
  loss that DiscoPOP found (arXiv:2406.08414).

  It is not monotone: for a temperature of 0.05 it increases between z = -0.118 and 0.072, so it has a
  local minimum on the wrong side of 0. m carries gradient.

  Args:
    margin: [...], z.
    label: [...], p.
    temperature: width of the change from one link to the other, in units of z.

  Returns:
    [...].

  >>> loss = preference_losses.modulated(jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [0.847 0.368]
  """

  def link(z):
    # m exp(-z) as one exponential: both of its factors may overflow alone.
    product = jnp.exp(jax.nn.log_sigmoid(z / temperature) - z)
    return jax.nn.sigmoid(-z / temperature) * jax.nn.softplus(-z) + product

  return _soft(link, margin, label)


def clipped_logistic(margin: Array, label: Array, *, bound: float = 2.0) -> Array:
  """l(z) = log(1 + exp(-clip(z, -bound, bound))): the logistic link of chiPO (arXiv:2407.13399).

  Args:
    margin: [...], z; outside the bounds it has no gradient.
    label: [...], p.
    bound: twice the range R of the rewards.

  Returns:
    [...].

  >>> loss = preference_losses.clipped_logistic(jnp.array([1.0, 9.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [0.313 0.127]
  """
  return logistic(jnp.clip(margin, -bound, bound), label)


def reverse_kl(margin: Array, label: Array) -> Array:
  """KL(q || p) of q = (sigmoid(z), sigmoid(-z)) and p = (label, 1 - label): EXO (arXiv:2402.00856).

      sigmoid(z) (log sigmoid(z) - log p) + sigmoid(-z) (log sigmoid(-z) - log(1 - p))

  `logistic` is the cross-entropy, that is the other direction of the KL, up to a constant. Both are
  minimal at z = log(p / (1 - p)). The label must be smoothed, so that this is finite.

  Args:
    margin: [...], z.
    label: [...], p; clamped to [1e-6, 1 - 1e-6].

  Returns:
    [...], at least 0.

  >>> loss = preference_losses.reverse_kl(jnp.array([0.0, 2.0]), jnp.array([0.5, 0.9]))
  >>> print(np.asarray(loss).round(3))
  [0.    0.002]
  """
  chex.assert_equal_shape([margin, label])
  label = jnp.clip(label, 1e-6, 1 - 1e-6)
  better, worse = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  return jnp.exp(better) * (better - jnp.log(label)) + jnp.exp(worse) * (worse - jnp.log1p(-label))


def focal(margin: Array, label: Array) -> Array:
  """l(z) = (1 - 2 max(0, sigmoid(z) - 1/2))^2 log(1 + exp(-z)): the focal ranking loss of reward models
  (InternLM2, arXiv:2403.17297).

  The factor is 1 for a pair in the wrong order and falls to 0 as the model gets sure of the right one,
  so hard pairs count more. It carries gradient. At z = 0 the loss has a kink.

  Args:
    margin: [...], z.
    label: [...], p.

  Returns:
    [...].

  >>> loss = preference_losses.focal(jnp.array([-2.0, 2.0]), jnp.array([1.0, 1.0]))
  >>> print(np.asarray(loss).round(3))
  [2.127 0.007]
  """
  focus = lambda z: jnp.square(1 - 2 * jax.nn.relu(jax.nn.sigmoid(z) - 0.5))
  return _soft(lambda z: focus(z) * jax.nn.softplus(-z), margin, label)


def _soft(link: Callable[[Array], Array], margin: Array, label: Array) -> Array:
  """p l(z) + (1 - p) l(-z)."""
  chex.assert_equal_shape([margin, label])
  return label * link(margin) + (1 - label) * link(-margin)


TABLE = table(
  'preference_losses',
  logistic,
  squared,
  hinge,
  exponential,
  truncated_square,
  savage,
  sigmoid,
  modulated,
  clipped_logistic,
  reverse_kl,
  focal,
)
Part = Annotated[Callable, TABLE]
