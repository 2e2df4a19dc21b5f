"""DPO (arXiv:2305.18290): logistic link on the difference of summed log-ratios.

loss = mean over pairs of softplus(-beta h), h = (log pi/ref)(chosen) - (log pi/ref)(rejected), beta
= 0.1. Pairs are right sums against sums with a wrong digit. Confidence: formula as in the authors'
code and TRL.

    python -m polgrad.train --config=experiments/preference/dpo.py --workdir=runs/dpo
"""

from experiments.common import arithmetic_experiment, options, preference_phase, warm_start
from polgrad import objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=100, smoke=False)
  phase = preference_phase(
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=0.1,
    ),
    anchors={'reference': part(optim.fixed)},
    steps=o.steps,
  )
  return arithmetic_experiment({'sft': warm_start(), 'preference': phase}, smoke=o.smoke)
