from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def luffy(*, max_new_tokens: int, gamma: float = 0.1, eps: float = 0.2) -> Method:
  """LUFFY (arXiv:2504.14945): a demonstration in every group, learned from by a shaped probability.

      samples:        loss = -(sum over tokens of min(r A, clip(r, 1 - eps, 1 + eps) A))
                             / (rows max_new_tokens)
      demonstrations: loss = -(sum over tokens of A p / (p + gamma)) / (rows max_new_tokens)

  r = pi / pi_old, and p = pi(token). A is group-normalised over the samples and the demonstration
  together. The gradient of log pi at a token of a demonstration has the weight
  gamma p / (p + gamma)^2, which is largest at p = gamma: at tokens that the policy finds unlikely,
  but not nearly impossible. The loss is the sum of both parts. The constant is the same in both, so
  that a token has the same weight in both.

  Differences: There is one demonstration per prompt, beside the samples. The loss is divided by a
  constant instead of the number of tokens.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    gamma: probability at which a token of a demonstration is learned most.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (shaping, weight), MEMORY (the normalisers).
  """
  budget = part(aggregation.constant_length, length=max_new_tokens)
  demonstration = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.probability_shaped, gamma=gamma),
    aggregation=budget,
  )
  sampled = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
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
