"""Objectives of given sequences: their likelihood, or the distance to a teacher on them."""

from collections.abc import Callable, Mapping
from typing import Annotated

from polgrad.losses import aggregation as aggregations
from polgrad.losses import divergences, logit_stats, penalties
from polgrad.losses import weights as token_weights
from polgrad.objectives.base import (
  Objective,
  of_logits,
  off_policy_metrics,
  reads,
  view,
  weigh,
)
from polgrad.registry import call

LossPart = Annotated[Callable, penalties.TABLE | logit_stats.TABLE]


def distillation(*, divergence: divergences.Part, aggregation: aggregations.Part) -> Objective:
  """AGG over tokens of D(teacher || student) over the whole vocabulary (arXiv:2306.13649).

  The sequences may come from the student, the teacher or a data set; their distribution carries no
  gradient. The [B, T, V] logits are never held: the divergence is evaluated in the chunked pass.
  """

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    return {'distillation': aggregation(x['divergence'], batch.mask)}, off_policy_metrics(x)

  return Objective(
    requires=frozenset({'teacher_logits'}), apply=apply, stats={'divergence': divergence}
  )


def supervised(
  *,
  aggregation: aggregations.Part,
  loss: LossPart = penalties.nll,
  weights: Mapping[str, token_weights.Part] = {},
  preferred_only: bool = False,
) -> Objective:
  """AGG of prod_k w_k * loss: the likelihood of given completions.

  Args:
    aggregation: how token losses become one number.
    loss: of one given token, -logp by default; one of the whole distribution reads `logits`.
    weights: detached token weights (none: plain supervised fine-tuning).
    preferred_only: look only at rows with label 1, e.g. the chosen half of preference pairs.
  """
  stats = {'loss': loss} if of_logits(loss) else {}

  def apply(outputs, batch, state, *, step):
    del state, step
    x = view(outputs, batch)
    where = batch.mask
    if preferred_only:
      where = where & (x['label'] > 0.5)[:, None]
    token_loss = weigh(x['loss'] if stats else call(loss, x), weights, x)
    return {'nll': aggregation(token_loss, where)}, off_policy_metrics(x)

  label = {'label'} if preferred_only else set()
  return Objective(requires=reads([loss, *weights.values()]) | label, apply=apply, stats=stats)
