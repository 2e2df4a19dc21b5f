from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def otb(*, discount: float = 1.0, lone_baseline: bool = False) -> Method:
  """OTB (arXiv:2602.07078): the baseline of least variance for every position of the group.

      loss = -mean over sequences of sum_t (G_t - b_t) log pi_t
      b_t = sum_j W_jt G_jt / sum_j W_jt in the group

  G_jt is the reward to go of row j at token t. W_jt is the squared norm of the gradient of log pi
  of the row's tokens up to t, taken with respect to the logits: the sum of |e - pi|^2, e the
  one-hot token. Where only one row of the group has a token, at the end of the longest row and in a
  group of one, b is 0.

  Differences: The paper compares whole runs with other baselines. Here the baseline is used in
  plain on-policy REINFORCE with one update per rollout. The formula has b = G where a row is alone,
  so that its last tokens learn nothing; verl's code, by the authors, has b = 0.

  Args:
    discount: factor of the reward to go, per token.
    lone_baseline: whether a row that is alone has b = G, as in the formula, instead of 0.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, stats={'score_norm': part(logit_stats.score_norm)}),
    credit=part(credit.token_baseline, discount=discount, lone_baseline=lone_baseline),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
