from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dro() -> Method:
  """DRO per token (arXiv:2405.19107): REINFORCE with a squared log-ratio to the old policy, as in verl.

  loss = token mean of -A log pi + beta / 2 (log pi - log pi_old)^2, A = R - group mean, beta = 0.1.
  The paper regresses whole answers on a learned value (`dro_v`) and has no such form. Ours: rollouts
  are four batches old, and pi_old is the policy that sampled.
  Confidence: CODE (formula), MEMORY (beta).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={'mirror': weighted(0.1, part(penalties.squared_log_ratio))},
    ),
    minibatches=4,
  )
