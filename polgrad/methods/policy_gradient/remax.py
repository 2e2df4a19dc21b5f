from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def remax() -> Method:
  """ReMax (arXiv:2310.10505): REINFORCE with the reward of the greedy answer as the baseline.

      loss = -mean over sequences of A log pi(y),   A = R - R(greedy answer to the prompt)

  The estimate of the gradient is unbiased, because the greedy answer does not depend on the sample.

  Differences: The paper draws one sample per prompt and adds a KL penalty to the reward. Here all
  samples of a prompt share one greedy answer, and there is no KL. The authors' code, unlike their
  formula, takes the mean over tokens: aggregation `token_mean`, which is not unbiased.

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
