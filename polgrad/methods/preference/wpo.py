from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, logit_stats, pair_weights, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def wpo(*, beta: float = 0.01, cap: float = 1.0, greedy: bool = False) -> Method:
  """WPO (arXiv:2406.11827): DPO with more weight on pairs that the policy might have sampled.

      loss = mean over pairs of w softplus(-beta h)
      w = min(cap, exp(a_w + a_l)),  a = mean over tokens of log pi(y_t) - log sum_v pi(v)^2

  h is the margin of `dpo`, and w carries no gradient. log sum_v pi(v)^2 makes up for how spread out the
  policy is: under a uniform policy w = 1.

  Differences: TRL has no cap. The paper's mixture of sampled and given pairs is a matter of the data.

  Args:
    beta: coefficient of the KL to the reference.
    cap: largest weight.
    greedy: compare with the log-prob of the most likely token, max_v log pi(v), in place of
      log sum_v pi(v)^2.

  Confidence: CODE.
  """
  typical = logit_stats.largest_logp if greedy else logit_stats.log_collision
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      weights={'alignment': part(pair_weights.alignment, cap=cap)},
      stats={'typical_logp': part(typical)},
    ),
    anchors={'reference': part(optim.fixed)},
  )
