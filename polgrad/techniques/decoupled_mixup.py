"""Mixup of inputs, and its decoupled loss (arXiv:2203.10761)."""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array


def mix(key: Array, inputs: Array, *, alpha: float = 0.2) -> tuple[Array, Array, Array]:
  """Mixes each input with that of another row: lam x + (1 - lam) x[partner].

  Args:
    key: a key of jax.random.
    inputs: [B, ...].
    alpha: > 0; lam ~ Beta(alpha, alpha), one number for the whole batch.

  Returns:
    The mixed inputs [B, ...], partner i32[B], a permutation of the rows, and lam f32[].

  Raises:
    ValueError: alpha is not positive.
  """
  if not alpha > 0:
    raise ValueError(f'alpha is {alpha}, and must be positive')
  for_rate, for_rows = jax.random.split(key)
  lam = jax.random.beta(for_rate, alpha, alpha, dtype=inputs.dtype)
  partner = jax.random.permutation(for_rows, inputs.shape[0])
  return lam * inputs + (1 - lam) * inputs[partner], partner, lam


def loss(logits: Array, first: Array, second: Array, lam: Array, *, eta: float = 0.1) -> Array:
  """The cross entropy of mixup, plus eta times that of each class without the other: -> [B].

      MCE = -lam log p_a - (1 - lam) log p_b
      D_a = -log( exp(z_a) / sum_{k != b} exp(z_k) ),  D_b likewise without a
      MCE + eta (lam D_a + (1 - lam) D_b)

  In MCE the two mixed classes compete, so the best probabilities are lam and 1 - lam. D_a does not
  depend on z_b, nor D_b on z_a: the penalty asks for both classes against all others.

  eta=0 is the loss of mixup. Rows with a = b have the usual cross entropy alone.

  Differences: the released code leaves D out where lam is exactly 0.5. Here it is kept, because
  nothing is undefined there.

  Confidence: CODE.

  Args:
    logits: [B, K].
    first: i32[B], class a of each row.
    second: i32[B], class b.
    lam: [] or [B], the part of a in the input.
    eta: weight of the decoupled terms.

  >>> z = jnp.array([[2.0, 1.0, 0.5, -1.0]])
  >>> print(loss(z, jnp.array([0]), jnp.array([1]), jnp.array(0.7)).round(4))
  [0.8287]
  """
  chex.assert_rank([logits, first, second], [2, 1, 1])
  chex.assert_equal_shape_prefix([logits, first, second], 1)
  lam = jnp.broadcast_to(lam, first.shape)
  classes = jnp.arange(logits.shape[1])[None]

  def cross_entropy(label: Array, without: Array | None) -> Array:
    allowed = True if without is None else classes != without[:, None]
    scores = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1, where=jnp.broadcast_to(allowed, logits.shape)) - scores

  mixed = lam * cross_entropy(first, None) + (1 - lam) * cross_entropy(second, None)
  decoupled = lam * cross_entropy(first, second) + (1 - lam) * cross_entropy(second, first)
  return mixed + jnp.where(first == second, 0, eta * decoupled)
