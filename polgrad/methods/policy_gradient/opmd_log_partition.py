from polgrad import objectives
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd_log_partition(*, samples_per_prompt: int = 8, tau: float = 1.0) -> Method:
  """OPMD with an estimated Z (arXiv:2501.12599): mirror descent towards pi_old exp(R / tau) / Z.

      loss = mean over rows of (R - tau log Z - tau log(pi / pi_old))^2 / (2 tau^2)

  tau log Z is estimated as tau log mean exp(R / tau) over the group. The estimate tends to the
  exact value as the group of samples from pi_old grows, and is too low on average in a small group.

  Differences: A rollout is cut into four minibatches. It is not stale, because the estimate assumes
  that pi_old sampled.

  Args:
    samples_per_prompt: size of a group; the run fills it in.
    tau: coefficient of the KL, in units of the reward.

  Confidence: PAPER (formula), CODE (tau), DERIVED (fixed point).
  """
  return Method(
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.old_log_ratio_sum),
      center=part(log_partition.log_partition),
      beta=tau,
      scale=1.0,
      rows_per_prompt=samples_per_prompt,
    ),
    minibatches=4,
  )
