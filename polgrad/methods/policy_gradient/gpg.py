from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gpg() -> Method:
  """GPG (arXiv:2504.02546): REINFORCE with a group mean, rescaled by the informative groups.

      loss = -token mean of A log pi,   A_i = (B / (B - M)) (R_i - mean_g)

  B is the number of rows of the batch, and M the number of rows in groups of equal rewards. There
  is no ratio, clipping, KL or standard deviation.

  Differences: verl has B / #{R != 0} in the place of B / (B - M), which is `baselines.nonzero_mean`.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(baselines.informative_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
  )
