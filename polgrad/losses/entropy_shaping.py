"""Advantages and bounds that depend on the entropy of the next token, or of a step."""

import chex
import jax.numpy as jnp

from polgrad.losses import turns
from polgrad.types import Array


def modulated(
  gains: Array,
  entropy: Array,
  turn_ids: Array,
  mask: Array,
  *,
  decay: float = 1.0,
  next_decay: float = 1.0,
  bonus: float = 0.05,
) -> Array:
  """A_s = A g(H_s) + bonus exp(-next_decay H_{s+1}), minus the mean of these over the steps: EMPG
  (arXiv:2509.09265).

  H_s is the mean entropy of the tokens of step s, scaled to [0, 1] by the least and the largest of the
  batch, and g(H) = exp(-decay H) divided by its mean over the steps. So confident steps are pushed
  further and uncertain ones less. The second term, which the last step lacks, rewards steps after which
  the policy is confident. The norm of the score grows with the entropy, which g counteracts.

  Args:
    gains: [B], A.
    entropy: [B, T], nats.
    turn_ids: i32[B, T], which step of its row a token belongs to; steps are numbered from 0.
    mask: bool[B, T].
    decay: k in the paper.
    next_decay: k' in the paper.
    bonus: zeta in the paper.

  Returns:
    [B, T], the same at all tokens of a step.
  """
  chex.assert_equal_shape([entropy, turn_ids, mask])
  present = turns.present(turn_ids, mask)
  mean = lambda x: jnp.sum(jnp.where(present, x, 0)) / jnp.maximum(jnp.sum(present), 1)
  steps = turns.means(entropy, turn_ids, mask)
  least = jnp.min(jnp.where(present, steps, jnp.inf))
  largest = jnp.max(jnp.where(present, steps, -jnp.inf))
  scaled = jnp.where(present, (steps - least) / (largest - least + 1e-8), 0)
  gain = jnp.exp(-decay * scaled)
  gain = gain / jnp.maximum(mean(gain), 1e-8)
  later = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
  following = jnp.where(later(present), jnp.exp(-next_decay * later(scaled)), 0)
  credit = gains[:, None] * gain + bonus * following
  return turns.at_tokens(credit - mean(credit), turn_ids, mask)
