"""SimPO (arXiv:2405.14734): mean log-probs as scores, a target margin, no reference.

loss = mean over pairs of softplus(-(beta (l_w - l_l) - gamma)), l the mean log-prob of the
completion, beta = 2, gamma = 0.5 (gamma / beta = 0.25, the class default). Confidence: formula as
in the authors' code.

    python -m polgrad.train --config=experiments/preference/simpo.py --workdir=runs/simpo
"""

from experiments.common import arithmetic_experiment, options, preference_phase, warm_start
from polgrad import objectives
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=100, smoke=False)
  phase = preference_phase(
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.logp_mean),
      link=part(preference_losses.logistic),
      beta=2.0,
      offset=0.5,
    ),
    steps=o.steps,
  )
  return arithmetic_experiment({'sft': warm_start(), 'preference': phase}, smoke=o.smoke)
