from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dppo() -> Method:
  """DPPO-TV (arXiv:2602.04879): a trust region of probabilities in the place of ratios.

  loss = token mean of -K r A + 0.001 log(r)^2, r = pi / pi_behavior, K = 1[A >= 0 and pi -
  pi_behavior <= 0.2, or A <= 0 and pi - pi_behavior >= -0.2]: rare tokens may change by a large
  factor. The second term is on all tokens. Advantages are R - mean_g and rollouts four batches old,
  as asynchronous training makes them.
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
      weights={'region': part(weights.probability_one_sided, low=0.2, high=0.2)},
      penalties={'kl': weighted(0.002, part(penalties.squared_log_ratio))},
    ),
    minibatches=2,
  )
