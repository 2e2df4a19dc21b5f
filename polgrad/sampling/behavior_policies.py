"""Behavior policies: functions from logits to the logits that completions are drawn from.

Each positional argument holds the logits f32[..., V] of one parameter set, and the argument's name
says which one: `policy` is the model in training, any other name is an anchor, such as `reference`.
The sampler keeps one key-value cache for each parameter set. The result is f32[..., V]; a token with
logit -inf is never drawn.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import table

Array = jax.Array


def current(policy: Array) -> Array:
  """The policy, unchanged."""
  return policy


def greedy(policy: Array) -> Array:
  """Probability 1 on the most likely token; of equally likely ones, on the first."""
  best = jnp.argmax(policy, axis=-1, keepdims=True)
  return jnp.where(jax.nn.one_hot(best[..., 0], policy.shape[-1], dtype=bool), 0.0, -jnp.inf)


def reference(reference: Array) -> Array:
  """The reference policy, unchanged; the policy in training is not evaluated."""
  return reference


def opponent(opponent: Array) -> Array:
  """The anchor `opponent`, unchanged, such as an average of past policies."""
  return opponent


def previous(previous: Array) -> Array:
  """The anchor `previous`, unchanged: the policy at the start of an iteration."""
  return previous


def geometric_mixture(policy: Array, reference: Array, *, reference_weight: float = 0.5) -> Array:
  """Normalised policy^(1 - w) * reference^w, token by token (Nash-MD, arXiv:2312.00886).

  Args:
    policy: logits f32[..., V] of the policy.
    reference: logits f32[..., V] of the reference.
    reference_weight: w in [0, 1]: 0 is the policy, 1 the reference.

  Returns:
    log-probabilities f32[..., V].
  """
  w = reference_weight
  log_policy, log_reference = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)
  return jax.nn.log_softmax((1 - w) * log_policy + w * log_reference)


TABLE = table(
  'behavior_policies', current, greedy, reference, opponent, previous, geometric_mixture
)
Part = Annotated[Callable, TABLE]
