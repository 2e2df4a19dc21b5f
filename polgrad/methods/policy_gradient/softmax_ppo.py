from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def softmax_ppo(*, bound: float = 1.3) -> Method:
  """sPPO (arXiv:2108.05828): the surrogate of softmax policies, on tokens whose ratio is near 1.

      loss = -token mean of 1[1 / bound <= r <= bound] A log r,   r = pi / pi_old

  A = R - group mean. The kept ratios are symmetric around 1 in log space. log r has the same
  gradient as log pi, so the code has log pi in its place. This is not SPPO (`sppo`).

  Differences: Rollouts are four batches old (lag=4), and pi_old is the policy that sampled them.

  Args:
    bound: largest ratio of a token that is kept; the smallest is 1 / bound.

  Confidence: CODE (formula and bound).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      weights={'region': part(weights.two_sided, low=1 / bound, high=bound)},
    ),
    minibatches=4,
  )
