from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, implicit_rewards, preference_losses, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def hypo(*, beta: float = 0.05, kl_coefficient: float = 0.01) -> Method:
  """HyPO (arXiv:2406.01462): DPO on given pairs, and a KL to the reference on samples of the policy.

      loss = mean over pairs of softplus(-beta h)
             + kl_coefficient (mean over samples of sum_t D_t log pi(y_t))
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)
      D_t = sum over s >= t of log(pi / reference)(y_s), constant

  The expected gradient of the second term is that of KL(pi, reference). DPO alone may move all
  probability to answers that no pair has; the KL on the policy's own samples keeps it from that. Each
  group has two samples and the pair of the record. No reward is read.

  Args:
    beta: coefficient of the log-ratios.
    kl_coefficient: of the KL to the reference.

  Confidence: PAPER (structure), MEMORY (constants).
  """
  pairs = part(
    objectives.Pairwise,
    score=part(implicit_rewards.log_ratio_sum),
    link=part(preference_losses.logistic),
    beta=beta,
  )
  samples = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.reinforce),
    aggregation=part(aggregation.sequence_sum),
  )
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2, preferences=1),
    credit=part(credit.kl_to_go),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, pairs), 'sampled': weighted(kl_coefficient, samples)},
    ),
    anchors={'reference': part(optim.fixed)},
    learns='preference',
  )
