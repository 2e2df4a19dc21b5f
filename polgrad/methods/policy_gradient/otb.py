from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def otb(*, discount: float = 1.0) -> Method:
  """OTB (arXiv:2602.07078): the baseline of least variance for every position of the group.

      loss = -mean over sequences of sum_t (G_t - b_t) log pi_t
      b_t = sum_j W_jt G_jt / sum_j W_jt in the group

  G_jt is the reward to go of row j at token t. W_jt is the squared norm of the gradient of log pi
  of the row's tokens up to t, taken with respect to the logits: the sum of |e - pi|^2, e the
  one-hot token.

  Differences: The paper compares whole runs with other baselines. Here the baseline is used in
  plain on-policy REINFORCE with one update per rollout.

  Args:
    discount: factor of the reward to go, per token.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, stats={'score_norm': part(logit_stats.score_norm)}),
    credit=part(credit.token_baseline, discount=discount),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
