from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def topr_token() -> Method:
  """TOPR with token ratios (arXiv:2503.14286): the variant of Trinity-RFT, another algorithm.

  loss = -token mean of w R log pi, R = 1 or -1; w = 1 if R > 0, else min(pi / pi_old, 1) of the token
  alone. Ours: rollouts are four batches old, and pi_old is the policy that sampled. The rate is
  2e-5; at 1e-4 accuracy fell from 0.43 to 0.00 in 24 batches.
  Confidence: CODE (formula and bounds).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.raw)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      ratio=part(ratios.token),
      aggregation=part(aggregation.token_mean),
      weights={
        'taper': part(
          weights.tapered,
          positive_low=1.0,
          positive_high=1.0,
          negative_low=0.0,
          negative_high=1.0,
        )
      },
    ),
    # R is 1 for a right answer and -1 for a wrong one; the pattern fits every text.
    reward_scale=2.0,
    rewards={'offset': weighted(-1.0, part(verifiers.regex_format, pattern='.*'))},
    minibatches=4,
    learning_rate=0.2,
  )
