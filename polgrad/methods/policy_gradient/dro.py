from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dro(*, beta: float = 0.1) -> Method:
  """DRO per token (arXiv:2405.19107): REINFORCE with a squared log-ratio to the old policy.

      loss = token mean of -A log pi + (beta / 2) (log pi - log pi_old)^2

  The form is that of verl. A is the reward minus the group mean, and pi_old the policy that
  sampled.

  Differences: The paper has no form per token: it regresses whole answers on a learned value
  (`dro_v`). Rollouts are four batches old (lag=4).

  Args:
    beta: coefficient of the squared log-ratio.

  Confidence: CODE (formula), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={'mirror': weighted(beta, part(penalties.squared_log_ratio))},
    ),
    minibatches=4,
  )
