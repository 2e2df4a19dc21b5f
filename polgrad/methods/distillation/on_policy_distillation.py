from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import part


def on_policy_distillation() -> Method:
  """On-policy distillation (arXiv:2306.13649, GKD with lambda = 1): reverse KL on the student's samples.

  loss = token mean of KL(student || teacher) over the whole vocabulary; the samples carry no
  gradient. The teacher is the model after a supervised phase, the student starts again from its first
  weights. Confidence: CODE, formula as in TRL (code).
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
