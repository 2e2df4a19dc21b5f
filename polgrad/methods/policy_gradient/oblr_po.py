from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, baselines, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def oblr_po(*, learning_rate: float, decay: float = 0.9) -> Method:
  """OBLR-PO (arXiv:2511.23310): the baseline of least variance, and steps scaled by their noise.

      loss = -mean over rows of A_i log pi(y_i)
      A_i = R_i - sum_j w_j R_j / sum_j w_j in the group
      step = (step of AdamW) SNR / (1 + SNR)

  w_j is the squared norm of the gradient of log pi(y_j), and SNR = ||g||^2 / (variance of the
  estimated gradient g).

  Differences: w_j is taken with respect to the logits, which needs no backward pass. SNR is
  estimated from the gradients of the two halves of the batch, by running means. The halves share no
  group if the number of prompts is even, and otherwise the one group in the middle. The step of
  AdamW is scaled, not the gradient. Its learning rate is 10 times that of the run.

  Args:
    learning_rate: a tenth of the learning rate of AdamW; the run fills it in.
    decay: decay of the running means, per update.

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
    optimizer=part(optim.signal_to_noise, optimizer=adamw, decay=decay),
  )
