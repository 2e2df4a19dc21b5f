from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, log_partition
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def a_star_po() -> Method:
  """A*-PO (arXiv:2505.20686): one answer a prompt, against the value of the best policy.

  V* = 0.5 log mean exp(R' / 0.5) over eight answers of the reference; loss = mean over rows of (beta
  log(pi / reference) - (R - V*))^2, beta = 0.001. The paper samples the reference once before
  training; here it is sampled with every batch. Few samples make V* too low, and prompts that the
  reference never solves have V* = 0.
  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=1,
      baseline_policy=part(behavior_policies.reference),
      baseline_samples=8,
    ),
    objective=part(
      objectives.Regression,
      score=part(implicit_rewards.log_ratio_sum),
      center=part(log_partition.soft_baseline, baseline_temperature=0.5),
      beta=1e-3,
      scale=2 * 1e-3**2,  # residuals are in units of beta
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
