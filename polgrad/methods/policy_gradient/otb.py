from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def otb() -> Method:
  """OTB (arXiv:2602.07078): the baseline of least variance for every position of the group.

  b_t = sum_j W_jt G_jt / sum_j W_jt, W_jt = sum_{s <= t} |e - pi|^2 the squared score norm, in the
  logits, of row j up to t; loss = -mean over sequences of sum_t (G_t - b_t) log pi. The paper
  compares whole runs with other baselines; we take plain on-policy REINFORCE around it, one update a
  rollout.
  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, stats={'score_norm': part(logit_stats.score_norm)}),
    credit=part(credit.token_baseline, discount=1.0),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
