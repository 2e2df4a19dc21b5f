from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pair_offsets, pair_selections, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def aot_paired(*, beta: float = 0.01, label_smoothing: float = 0.0) -> Method:
  """AOT on pairs (arXiv:2406.05882): the sorted margins of the policy against those of the reference.

      loss = mean over k of softplus(-beta (m_(k) - n_(k)))

  m = log pi(chosen) - log pi(rejected) and n, the same of the reference, are each sorted over the
  batch: the policy's margins are to dominate the reference's as a distribution, not pair by pair. A
  batch of one pair has the loss of DPO.

  Differences: A rank is a constant, so a pair keeps its own margin m and gets n_(k) of its rank from the
  whole batch. Value and gradient are those of the sorted loss, for any number of micro-batches.

  Args:
    beta: coefficient of the KL to the reference.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Confidence: CODE (TRL, where it is called `aot`).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      label_smoothing=label_smoothing,
      offsets={'matching': weighted(beta, part(pair_offsets.matched))},
      selections={'matched_gap': part(pair_selections.sorted_reference)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
