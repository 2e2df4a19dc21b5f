from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def opmd_kimi(*, tau: float = 0.1) -> Method:
  """OPMD-Kimi (arXiv:2501.12599): REINFORCE with a squared log-ratio to the old policy, per token.

      loss = token mean of -A log pi + tau / 2 (log pi - log pi_old)^2,   A = R - group mean

  The term tau log Z of the mirror-descent regression is replaced by the mean reward, so the optimum
  is not the tilted old policy, proportional to pi_old exp(R / tau).

  Differences: The paper squares the log-ratio of the whole answer (see `opmd_kimi_sequence`); this
  is the form per token of Trinity-RFT. No tau is published, so 0.1 is our choice. Rollouts are four
  batches old (lag=4), and pi_old is the policy that sampled them.

  Args:
    tau: coefficient of the squared log-ratio, in units of the reward.

  Confidence: CODE (token form), PAPER (centre), DERIVED (fixed point).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={'mirror': weighted(tau, part(penalties.squared_log_ratio))},
    ),
    minibatches=4,
  )
