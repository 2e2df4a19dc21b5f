from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import part


def on_policy_distillation() -> Method:
  """On-policy distillation (arXiv:2306.13649, GKD with lambda = 1): reverse KL on samples.

      loss = token mean of KL(student || teacher)

  The KL is exact: it sums over the vocabulary at each token. No gradient flows through the
  sampling. The teacher is the anchor `teacher`. If the run names no model for it, the teacher is a
  copy of the policy when the phase begins, after which the policy is initialised again and becomes
  the student.

  Confidence: CODE (formula as in TRL).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.reverse_kl),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
