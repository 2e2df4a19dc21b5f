from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def dppo(
  *, max_new_tokens: int, low: float = 0.15, high: float = 0.15, cap: float = 10.0
) -> Method:
  """DPPO-TV (arXiv:2602.04879): a trust region of probabilities in the place of ratios.

      loss = -(sum over tokens of sg(K min(r, cap)) A log pi) / (rows max_new_tokens)
      K = 1[A >= 0 and pi - pi_behavior <= high, or A <= 0 and pi - pi_behavior >= -low]

  r = pi / pi_behavior, with pi_behavior the policy that sampled, and A is the reward minus the
  group mean. A difference of probabilities lets rare tokens change by a large factor.

  Differences: Rollouts are four batches old (lag=4), as in asynchronous training. prime-rl has
  bounds of 0.2, no cap, and adds 0.001 log(r)^2 of all tokens, which is the term of Kimi-K2.5:
  penalties={'kl': weighted(0.002, part(penalties.squared_log_ratio))}, and the aggregation
  `token_mean`.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    low: largest decrease of the probability of a bad token.
    high: largest increase of the probability of a good token.
    cap: largest weight r.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.truncated, cap=cap),
      aggregation=part(aggregation.constant_length, length=max_new_tokens),
      proximal=part(ratios.behavior),
      weights={'region': part(weights.probability_one_sided, low=low, high=high)},
    ),
    minibatches=2,
  )
