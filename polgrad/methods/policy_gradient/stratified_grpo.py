from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, strata, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def stratified_grpo(
  *,
  stratum_pattern: str = '<search>',
  mix: float = 0.8,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
) -> Method:
  """Stratified GRPO (arXiv:2510.06214): answers are compared with those that searched equally often.

      A_i = mix A_stratum + (1 - mix) A_group, both (R_i - mean) / (std + 1e-6)
      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  The stratum of an answer are the answers to its prompt with equally many matches of
  `stratum_pattern`. Within a stratum A_stratum has mean 0 and variance 1. An answer that is alone in its
  stratum has A_stratum = 0.

  Differences: `mix` is tuned in the paper and its value is not known to us. The number of matches is a
  term of the reward with weight 0, `stratum`; put another verifier there for other strata. In a task of
  several turns verifiers see the last turn alone.

  Args:
    stratum_pattern: regular expression that is counted, a call of the search tool for example.
    mix: share of the part inside strata; 0 is group normalisation.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: PAPER (formula), MEMORY (mix, loss).
  """
  return Method(
    collect=partial(collect.Rollouts, terms=('stratum',)),
    credit=part(credit.outcome, advantage=part(strata.stratified, mix=mix)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    rewards={'stratum': weighted(0.0, part(verifiers.count_matches, pattern=stratum_pattern))},
    minibatches=2,
  )
