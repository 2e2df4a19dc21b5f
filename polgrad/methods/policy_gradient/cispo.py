from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def cispo() -> Method:
  """CISPO (arXiv:2506.13585): the importance weight is truncated and detached; no token is dropped.

  loss = -token mean of sg(min(r, 5)) A log pi. The cap is the ratio itself, that of ScaleRL
  (arXiv:2510.13786); the paper does not state its own. There is no lower bound and no KL.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.truncated, cap=5.0, floor=0.0),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
  )
