from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd_simple(*, tau: float = 1.0) -> Method:
  """OPMD-simple (arXiv:2509.24203): REINFORCE against the group mean, without the old policy.

      loss = -token mean of (R - group mean) log pi / (1 + tau)

  This is mirror descent to first order.

  Differences: The published code divides the loss by 1 + tau, which Adam would undo. Here the
  learning rate is divided by it instead. Rollouts are four batches old (lag=4).

  Args:
    tau: strength of the KL to the old policy; a larger one makes shorter steps.

  Confidence: CODE (formula and tau), DERIVED (division of the rate).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
    learning_rate=1 / (1 + tau),
  )
