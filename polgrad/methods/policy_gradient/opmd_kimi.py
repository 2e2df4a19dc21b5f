from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def opmd_kimi() -> Method:
  """OPMD-Kimi (arXiv:2501.12599): REINFORCE with a squared log-ratio to the old policy, token by token.

  loss = token mean of -A log pi + tau / 2 (log pi - log pi_old)^2, A = R - group mean: tau log Z of
  the mirror-descent regression is replaced by the mean reward, so the policy at rest is not the
  tilted old one. The paper squares the log-ratio of the whole answer (`opmd_kimi_sequence`); per
  token is what Trinity-RFT has. tau = 0.1 is ours, none is published. Ours also: rollouts are four
  batches old.
  Confidence: CODE (token form), PAPER (centre), DERIVED (fixed point).
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
