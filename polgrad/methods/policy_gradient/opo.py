from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def opo() -> Method:
  """OPO (arXiv:2505.23585): on-policy REINFORCE with the length-weighted baseline.

      loss = -mean over sequences of (R - b) log pi(y),   b = sum_j L_j R_j / sum_j L_j in the group

  b is the baseline of least variance if the squared gradient norm of a row is proportional to its
  length L. As in the paper there is one update per rollout, no clipping and no KL.

  Differences: The formula has the sum over the tokens of a row. verl, whose loss the authors use,
  takes the mean over tokens: aggregation `token_mean`.

  Confidence: PAPER, CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(baselines.length_weighted)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
