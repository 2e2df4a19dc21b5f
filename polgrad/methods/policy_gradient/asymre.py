from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def asymre() -> Method:
  """AsymRE (arXiv:2506.20520): off-policy REINFORCE with a baseline below the mean reward.

  loss = -token mean of (R - group mean + 0.1) log pi: good rows count more than bad ones, and
  off-policy data do not collapse the policy. A baseline lowered by s is exactly s times supervised
  learning on what was sampled, and so it is written here. Ours: rollouts are four batches old.
  Confidence: CODE (formula), MEMORY (shifts other than 0.1).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={'shift': weighted(0.1, part(penalties.nll))},
    ),
    minibatches=4,
  )
