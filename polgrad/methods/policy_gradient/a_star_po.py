from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def a_star_po(
  *, beta: float = 1e-3, baseline_temperature: float = 0.5, baseline_samples: int = 8
) -> Method:
  """A*-PO (arXiv:2505.20686): one answer per prompt, against the value of the best policy.

      loss = mean over rows of (beta log(pi / reference) - (R - V*))^2
      V* = baseline_temperature log(mean of exp(R' / baseline_temperature))

  R' are the rewards of `baseline_samples` answers of the reference to the same prompt. With few of
  them V* is too low on average, and a prompt that the reference never solves has V* = 0 if rewards
  are 0 or 1.

  Differences: The paper samples the reference once, before training. Here it is sampled with every
  batch.

  Args:
    beta: coefficient of the KL to the reference, in units of the reward.
    baseline_temperature: temperature of V*, in units of the reward.
    baseline_samples: answers of the reference per prompt.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      baseline_policy=part(behavior_policies.reference),
      baseline_samples=baseline_samples,
    ),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.soft_baseline, baseline_temperature=baseline_temperature),
      beta=beta,
      scale=2 * beta**2,  # the objective measures residuals in units of beta
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
