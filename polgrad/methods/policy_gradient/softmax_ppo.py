from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def softmax_ppo() -> Method:
  """sPPO (arXiv:2108.05828): the surrogate of softmax policies, on the tokens whose ratio is near 1.

  loss = -token mean of 1[1 / 1.3 <= r <= 1.3] A log r, r = pi / pi_old, A = R - group mean. log r has
  the gradient of log pi, and it is written so here; the region is symmetric in log space. Ours:
  rollouts are four batches old, and pi_old is the policy that sampled. Not to be confused with SPPO
  (`sppo`).
  Confidence: CODE (formula and bound).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.two_sided, low=1 / 1.3, high=1.3)},
    ),
    minibatches=4,
  )
