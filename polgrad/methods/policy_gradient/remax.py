from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def remax() -> Method:
  """ReMax (arXiv:2310.10505): REINFORCE with the reward of the greedy answer as the baseline.

  A_i = R_i - R(greedy answer to the prompt); loss = -mean over sequences of A * log pi(y). Unbiased,
  since the greedy answer does not depend on the sample. The paper draws one sample a prompt and adds
  a KL penalty to the reward; we draw `group` samples against one greedy answer, without KL.
  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts, baseline_policy=part(behavior_policies.greedy), baseline_samples=1
    ),
    credit=part(credit.outcome, advantage=part(baselines.sampled_baseline)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
