from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def spin(*, beta: float = 0.1, every: int = 50) -> Method:
  """SPIN (arXiv:2401.01335): demonstrations are preferred to what an earlier policy writes.

      loss = mean over prompts of softplus(-beta h)
      h = log(pi / reference)(demonstration) - log(pi / reference)(sample)

  The reference is an earlier copy of the policy, and it also writes the sample. No reward is read. At
  the fixed point samples have the distribution of the demonstrations, and no h can tell them apart.

  Differences: The paper samples for all prompts first and trains several epochs on them in each of
  four iterations; here samples are drawn when they are used, by the same policy.

  Args:
    beta: coefficient of the KL to the reference.
    every: updates between two copies of the policy to the reference.

  Confidence: CODE (loss as DPO), MEMORY (beta and the length of an iteration).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      demonstrations=1,
      behavior_policy=part(behavior_policies.reference),
    ),
    credit=part(credit.imitation),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.sync, every=every)},
    learns='preference',
  )
