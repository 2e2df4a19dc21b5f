from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd_simple() -> Method:
  """OPMD-simple (arXiv:2509.24203): REINFORCE with the group mean, and nothing of the old policy.

  loss = -token mean of (R - group mean) log pi / (1 + tau): mirror descent to first order. The
  published code divides the loss, which Adam would undo; so here the learning rate is divided by 1 +
  tau = 2, and this is the whole method. Ours: rollouts are four batches old.
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
    learning_rate=0.5,
  )
