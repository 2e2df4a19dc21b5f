from polgrad import objectives
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part


def opmd_log_partition(*, samples_per_prompt: int = 8) -> Method:
  """OPMD with an estimated Z (arXiv:2501.12599): mirror descent towards pi_old exp(R / tau) / Z.

  loss = mean over rows of (R - tau log Z - tau log(pi / pi_old))^2 / (2 tau^2) with tau log Z
  estimated as tau log mean exp(R / tau) in the group, which is exact for many samples of pi_old
  itself and too low for few. tau = 1. Ours: four minibatches a rollout, and no staleness, for which
  the estimate is not made.
  Confidence: PAPER (formula), CODE (tau), DERIVED (fixed point).
  """
  return Method(
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.old_log_ratio_sum),
      center=part(log_partition.log_partition),
      beta=1.0,
      scale=1.0,
      rows_per_prompt=samples_per_prompt,
    ),
    minibatches=4,
  )
