"""On-policy distillation (arXiv:2306.13649, GKD with lambda = 1): reverse KL on the student's samples.

loss = token mean of KL(student || teacher) over the whole vocabulary; the samples carry no
gradient. The teacher is the model after a supervised phase, the student starts again from its first
weights. Confidence: formula as in TRL (code).

    python -m polgrad.train --config=experiments/distillation/on_policy.py --workdir=runs/on_policy
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=300, smoke=False)
  phase = addition_phase(
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.reverse_kl),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    steps=o.steps,
    prompts=64,
    samples_per_prompt=1,
    learning_rate=1e-3,
  )
  return arithmetic_experiment({'teach': warm_start(), 'distill': phase}, smoke=o.smoke)
