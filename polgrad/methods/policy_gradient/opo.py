from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def opo() -> Method:
  """OPO (arXiv:2505.23585): on-policy REINFORCE with the length-weighted baseline.

  b = sum_j L_j R_j / sum_j L_j over the group; loss = -mean over sequences of (R - b) log pi(y). The
  baseline of least variance if the squared gradient norm of a row grows like its length L. One
  update a rollout, no clip, no KL, as in the paper. Answers of the task have two or three digits, so
  lengths differ little.
  Confidence: PAPER.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(baselines.length_weighted)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
