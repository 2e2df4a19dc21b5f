import dataclasses

from ml_collections import ConfigDict

from polgrad.losses import aggregation, ratios
from polgrad.methods.base import Method
from polgrad.methods.policy_gradient.topr import topr
from polgrad.registry import part


def topr_token(
  *,
  positive_low: float = 1.0,
  positive_high: float = 1.0,
  negative_low: float = 0.0,
  negative_high: float = 1.0,
) -> Method:
  """TOPR with token ratios (arXiv:2503.14286): the variant of Trinity-RFT, a different algorithm.

      loss = -token mean of w R log pi
      w = clip(r, positive_low, positive_high) if R > 0, else clip(r, negative_low, negative_high)

  R is 1 for a right answer and -1 for a wrong one, without a baseline. r = pi / pi_old is the ratio
  of the token, and w is detached. By default w is 1 in a right answer and min(r, 1) in a wrong one.

  Differences: The paper has the ratio of the whole answer (see `topr`). Rollouts are four batches
  old (lag=4), and pi_old is the policy that sampled them. The learning rate is 0.2 times that of
  the run, because without a baseline most answers of a weak policy are pushed down.

  Args:
    positive_low: smallest weight of a right answer.
    positive_high: largest weight of a right answer.
    negative_low: smallest weight of a wrong answer.
    negative_high: largest weight of a wrong answer.

  Confidence: CODE (formula and bounds).
  """
  method = topr(
    positive_low=positive_low,
    positive_high=positive_high,
    negative_low=negative_low,
    negative_high=negative_high,
  )
  of_tokens = {'ratio': part(ratios.token), 'aggregation': part(aggregation.token_mean)}
  objective = ConfigDict({**method.objective, **of_tokens})
  return dataclasses.replace(method, objective=objective)
