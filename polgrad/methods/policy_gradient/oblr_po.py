from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, baselines, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def oblr_po(*, learning_rate: float) -> Method:
  """OBLR-PO (arXiv:2511.23310): the baseline of least variance, and steps that know their noise.

  A_i = R_i - sum_j w_j R_j / sum_j w_j in the group, w the squared norm of the row's score; loss =
  mean over rows of -A log pi(y). A step is scaled by SNR / (1 + SNR), SNR = ||g||^2 over the
  variance of its estimate. Ours: w is taken in the logits, where it needs no backward pass; the SNR
  comes from the gradients of two halves of the batch (which share groups), as a running mean; Adam's
  whole step is scaled.

  Confidence: DERIVED (formulas), MEMORY (estimators).
  """
  adamw = part(optim.adamw, learning_rate=10 * learning_rate)
  return Method(
    collect=partial(collect.Rollouts, stats={'score_norm': part(logit_stats.score_norm)}),
    credit=part(credit.outcome, advantage=part(baselines.gradient_weighted)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    optimizer=part(optim.signal_to_noise, optimizer=adamw, decay=0.9),
  )
