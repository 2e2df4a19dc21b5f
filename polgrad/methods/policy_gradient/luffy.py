from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def luffy(*, max_new_tokens: int) -> Method:
  """LUFFY (arXiv:2504.14945): a demonstration in every group, learned from by a shaped probability.

  A_i is group-normalised over samples and demonstration together. Samples have the clipped loss, the
  demonstration -A p / (p + 0.1), p = pi(token), whose gradient has the weight 0.1 p / (p + 0.1)^2:
  most where the policy finds a token unlikely, not impossible. Both are sums over one constant, so a
  token weighs the same in both. Ours: one demonstration for 8 samples, and a constant for the number
  of tokens.

  Confidence: CODE (shaping, weight), MEMORY (the normalisers).
  """
  budget = part(aggregation.constant_length, length=max_new_tokens)
  demonstration = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.probability_shaped, gamma=0.1),
    aggregation=budget,
  )
  sampled = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
    aggregation=budget,
  )
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, demonstration), 'sampled': weighted(1.0, sampled)},
    ),
    minibatches=2,
  )
