"""The objective of a scorer of prefixes, which steers another model's decoding."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from polgrad.losses import aggregation as aggregations
from polgrad.losses import logit_stats, prefix_values
from polgrad.objectives.base import (
  Metrics,
  Objective,
  State,
  StatFunction,
  Terms,
  call_slot,
  token_mean,
  view,
)
from polgrad.types import Array, Batch, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixValues(Objective):
  """AGG over tokens of (V_t - target_t)^2 / 2, where the logits of the model are values.

  The trained model is no policy. Its logit of token z after a prefix is V([prefix, z]), the expected
  reward once z has been added, so one forward pass scores all next tokens. V_t is the logit of the token
  that the row has at t.

  The metrics are `token_value`, the mean of V_t, and `value_error`, the mean of |V_t - target_t|. Rows
  without a reward (a failed verifier) have an empty mask and leave sum and count.

  Attributes:
    target: of each token, [B, T], in units of the reward.
    aggregation: how token losses become one number.
  """

  target: prefix_values.Part
  aggregation: aggregations.Part

  makes = frozenset({'token_value'})

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {'target': self.target}

  @functools.cached_property
  def stats(self) -> Mapping[str, StatFunction]:
    return {'token_value': logit_stats.token_logit}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    del state, step
    x = view(outputs, batch)
    target = jax.lax.stop_gradient(call_slot('target', self.target, x))
    error = x['token_value'] - target
    metrics = {
      'token_value': token_mean(x['token_value'], batch.mask),
      'value_error': token_mean(jnp.abs(error), batch.mask),
    }
    return {'prefix_values': self.aggregation(0.5 * jnp.square(error), batch.mask)}, metrics
