from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def cispo(*, cap: float = 5.0) -> Method:
  """CISPO (arXiv:2506.13585): the importance weight is truncated and detached; no token is dropped.

      loss = -token mean of sg(min(r, cap)) A log pi

  r = pi / pi_old, and A is the group-normalised reward. There is no lower bound and no KL.

  Differences: The paper does not state its cap. The default is that of ScaleRL (arXiv:2510.13786).

  Args:
    cap: largest ratio itself, not its distance from 1.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.truncated, cap=cap, floor=0.0),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
  )
