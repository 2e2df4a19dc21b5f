from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def asymre(*, shift: float = 0.1) -> Method:
  """AsymRE (arXiv:2506.20520): off-policy REINFORCE with a baseline below the mean reward.

      loss = -token mean of (R - group mean + shift) log pi

  Lowering the baseline makes good rows count more than bad ones, so that off-policy data do not
  make the policy collapse. A baseline that is lower by `shift` adds `shift` times the loss of
  supervised learning on the sampled rows, and the method is composed in this form.

  Differences: Rollouts are four batches old (lag=4).

  Args:
    shift: how far the baseline is below the group mean, in units of the reward.

  Confidence: CODE (formula), MEMORY (shifts other than 0.1).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={'shift': weighted(shift, part(penalties.nll))},
    ),
    minibatches=4,
  )
