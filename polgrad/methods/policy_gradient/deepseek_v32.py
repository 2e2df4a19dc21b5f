from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def deepseek_v32(*, eps: float = 0.2, limit: float = 0.5, kl_coefficient: float = 0.001) -> Method:
  """DeepSeek-V3.2 (arXiv:2512.02556): rows are kept if they are near or good; unbiased KL.

      loss = mean over sequences of token means of
             -M min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient r k3

  r = pi / pi_old, with pi_old the policy that sampled, and A is the reward minus the group mean. M
  is 1 in rows with A >= 0 or mean_t(log pi_old - log pi) <= limit, otherwise 0. k3 = q - 1 - log q
  with q = reference / pi. The gradient of r k3 also flows through r and is r log(pi / reference)
  times that of log pi. Its mean over tokens of pi_old is the gradient of KL(pi || reference).

  Differences: Rollouts are four batches old (lag=4). The paper states neither the limit, which is
  that of TRL, nor the coefficient of the KL, which is ours.

  Args:
    eps: distance of the clipping bounds from 1.
    limit: largest mean decrease of log pi in a row with A < 0 that is kept, in nats per token.
    kl_coefficient: of the KL to the reference.

  Confidence: CODE (formula), MEMORY (limit, coefficient of the KL).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
      weights={'opsm': part(weights.near_or_positive, limit=limit)},
      penalties={'kl': weighted(kl_coefficient, part(penalties.importance_k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
