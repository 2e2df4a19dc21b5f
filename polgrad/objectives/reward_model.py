"""The objective of reward models: pairs of scores, penalties on their level, and their calibration."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from polgrad.losses import implicit_rewards, pairs, score_penalties
from polgrad.objectives import heads
from polgrad.objectives.base import (
  Metrics,
  State,
  Terms,
  call_slot,
  check_distinct,
  row_mean,
)
from polgrad.objectives.sequence_level import Pairwise
from polgrad.reductions import CalibrationError
from polgrad.registry import check_weighted
from polgrad.types import Array, Batch, Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(Pairwise):
  """`Pairwise` on the scores of a scalar head, with penalties on the scores themselves.

  With p = sigmoid(beta (score_w - score_l)), the probability that the model gives to the label, the
  metrics are those of `Pairwise` and

  * `brier`: the mean of (p - label)^2; 1/4 if the model knows nothing.
  * `calibration_error`: see `reductions.CalibrationError`, of the row with the higher score.

  Both assume the Bradley-Terry model, so they say little where the link is not `logistic` or `focal`.
  Offsets do not enter them. They merge exactly over micro-batches and held-out batches.

  Attributes:
    score: of a row, [B]; by default the scalar head after its last token.
    penalties: functions of `score` and any arrays by name, [B / 2], each with its coefficient; each is a
      term of the loss.
    head: layers that read the states of the model at the last tokens of rows; score and penalties read
      what it gives by name.
  """

  score: implicit_rewards.Part = implicit_rewards.last_value
  penalties: Mapping[str, score_penalties.Part] = dataclasses.field(default_factory=dict)
  head: heads.Part = heads.Scalar

  def __post_init__(self):
    super().__post_init__()
    check_weighted('penalties', self.penalties)
    check_distinct(**{'terms of the loss': ['preference'], 'penalties': self.penalties})

  @property
  def rows_per_prompt(self) -> int:
    return self.head.rows_per_prompt

  @property
  def rows_together(self) -> int:
    return self.head.rows_per_prompt * self.head.prompts_together

  @functools.cached_property
  def requires(self) -> frozenset[str]:
    return super().requires | self.head.requires

  @functools.cached_property
  def slots(self) -> Mapping[str, Callable]:
    return {**super().slots, **{f'penalties.{n}': one.fn for n, one in self.penalties.items()}}

  def apply(
    self, outputs: Outputs, batch: Batch, state: State, *, step: Array | int
  ) -> tuple[Terms, Metrics]:
    terms, metrics = super().apply(outputs, batch, state, step=step)
    x = self.arrays(outputs, batch, state, step)
    self.add_scores(x)
    where = pairs.complete(batch.mask)
    for name, (coefficient, penalty) in self.penalties.items():
      loss = coefficient * call_slot(f'penalties.{name}', penalty, x)
      terms[name] = row_mean(loss, where)

    # How sure the model is of the row with the higher score, and the probability that it is right.
    gap = jax.lax.stop_gradient(self.beta * pairs.first(x['gap']))
    label = pairs.certainty(x['label'])
    right = jnp.where(gap == 0, 0.5, jnp.where(gap > 0, label, 1 - label))
    return terms, metrics | {
      'brier': row_mean(jnp.square(jax.nn.sigmoid(gap) - label), where),
      'calibration_error': CalibrationError.of(jax.nn.sigmoid(jnp.abs(gap)), right, where),
    }
