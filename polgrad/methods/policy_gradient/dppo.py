from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dppo(*, low: float = 0.2, high: float = 0.2, kl_coefficient: float = 0.002) -> Method:
  """DPPO-TV (arXiv:2602.04879): a trust region of probabilities in the place of ratios.

      loss = token mean of -K r A + (kl_coefficient / 2) log(r)^2
      K = 1[A >= 0 and pi - pi_behavior <= high, or A <= 0 and pi - pi_behavior >= -low]

  r = pi / pi_behavior, with pi_behavior the policy that sampled, and A is the reward minus the
  group mean. A difference of probabilities lets rare tokens change by a large factor. The second
  term is on all tokens.

  Differences: Rollouts are four batches old (lag=4), as in asynchronous training.

  Args:
    low: largest decrease of the probability of a bad token.
    high: largest increase of the probability of a good token.
    kl_coefficient: of log(r)^2 / 2, which approximates the KL to the policy that sampled.

  Confidence: CODE (formula), MEMORY (bounds).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      proximal=part(ratios.behavior),
      weights={'region': part(weights.probability_one_sided, low=low, high=high)},
      penalties={'kl': weighted(kl_coefficient, part(penalties.squared_log_ratio))},
    ),
    minibatches=2,
  )
