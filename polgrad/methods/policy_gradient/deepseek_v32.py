from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def deepseek_v32() -> Method:
  """DeepSeek-V3.2 (arXiv:2512.02556): off-policy rows must be near or good; an unbiased KL.

  loss = mean over sequences of token means of -M min(r A, clip(r, 0.8, 1.2) A) + 0.001 r k3, with A
  = R - mean_g, M = 1 in rows with A >= 0 or mean_t(log pi_old - log pi) <= 0.5, else 0. r k3 with
  its gradient through r too is -r log(pi / reference): KL(pi, reference) for tokens of the old
  policy, which is the sampler here. The limit is TRL's and the coefficient of the KL ours; the paper
  states neither.
  Confidence: CODE (formula), MEMORY (limit, coefficient of the KL).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.sequence_mean),
      weights={'opsm': part(weights.near_or_positive, limit=0.5)},
      penalties={'kl': weighted(0.001, part(penalties.importance_k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
