from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def kto(*, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Method:
  """KTO (arXiv:2402.01306): completions that are judged one by one count as gains or losses.

      loss = mean over rows of w (1 - sigmoid(s (beta D - z0)))
      D = log(pi / reference)(completion),  z0 = max(beta mean of D over mismatched rows, 0)

  s is 1 and w `desirable` for a row that is labelled good, -1 and `undesirable` for one that is labelled
  bad. D is a sum over the tokens of a completion. A mismatched row is a prompt of the batch with the
  completion of another one; z0 is a rough estimate of beta KL(pi, reference), without gradient. Pairs
  can be used too: each is a good and a bad row.

  Differences: The mean in z0 is that of the whole batch, over all devices and micro-batches, as in the
  paper; the authors' code leaves out values that are exactly 0. z0 is computed once for all updates on
  a batch; there is one update unless the run sets several. Held-out rows are measured with the z0 of
  their own batch. The weights are not adapted to the numbers of good and bad rows; see
  `losses.pointwise.kto` for the paper's advice.

  Args:
    beta: coefficient of the KL to the reference.
    desirable: weight of good rows.
    undesirable: weight of bad rows.

  Confidence: CODE (formula as in the authors' code and TRL).
  """
  return Method(
    collect=partial(collect.Feedback, mismatched=True),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.kto, desirable=desirable, undesirable=undesirable),
      beta=beta,
      selections={'reference_point': part(pointwise.mismatched_mean)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
