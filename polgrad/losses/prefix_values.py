"""Targets for the values of prefixes, from which a scorer of prefixes learns (arXiv:2310.17022).

The value V(x, y_1..t) of a prefix is the mean reward of its continuations by a fixed policy pi_ref. A
function of `TABLE` fills the slot `target` of `objectives.PrefixValues`. No gradient flows through it.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.losses import _common
from polgrad.registry import table
from polgrad.types import Array


def monte_carlo(rewards: Array, mask: Array) -> Array:
  """The reward of the row, at each of its tokens (CD-FUDGE).

  The mean over rows is the value under the policy that drew them, so only rows of pi_ref are right.

  Args:
    rewards: [B].
    mask: bool[B, T].

  Returns:
    [B, T], in units of the reward.
  """
  return jnp.broadcast_to(jax.lax.stop_gradient(rewards)[:, None], mask.shape)


def bootstrapped(rewards: Array, state_value: Array, mask: Array) -> Array:
  """The expected value after one more token of pi_ref, and the reward at the last token (CD-Q).

      target_t = sum_z pi_ref(z | y_1..t) V(y_1..t z),   at the last token of the row the reward

  pi_ref chooses the next token in this sum, so the rows may come from any policy. The sum at t is the
  statistic `state_value` at the next token of the mask.

  Args:
    rewards: [B].
    state_value: [B, T], value of the prefix before each token, see `logit_stats.expected_logit`.
    mask: bool[B, T].

  Returns:
    [B, T], in units of the reward.
  """
  value, there = _common.at_next(state_value, mask)
  return jax.lax.stop_gradient(jnp.where(there, value, rewards[:, None]))


TABLE = table('prefix_values', monte_carlo, bootstrapped)
Part = Annotated[Callable, TABLE]
