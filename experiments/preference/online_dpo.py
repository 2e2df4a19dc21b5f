"""Online DPO (arXiv:2402.04792): two samples a prompt, ranked by their rewards, then the DPO loss.

The paper asks a language model for the preference; here the verifier says which sum is right. Pairs
that tie teach nothing and are left out of loss and count. beta = 0.1. Confidence: formula as in TRL
(code).

    python -m polgrad.train --config=experiments/preference/online_dpo.py --workdir=runs/online_dpo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, smoke=False)
  phase = addition_phase(
    credit=part(credit.preference),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=0.1,
    ),
    anchors={'reference': part(optim.fixed)},
    steps=o.steps,
    prompts=128,
    samples_per_prompt=2,
  )
  return arithmetic_experiment({'sft': warm_start(), 'online': phase}, smoke=o.smoke)
