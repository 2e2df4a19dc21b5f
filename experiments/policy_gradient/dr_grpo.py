"""Dr. GRPO (arXiv:2503.20783): GRPO without its two normalisers.

A_i = R_i - mean_g (no std); loss = sum over tokens / (rows * budget), a constant in place of the
lengths; no KL. Equal to RLOO times (G - 1) / G but for the constant.
Confidence: CODE (the authors').
Card: S8.

    python -m polgrad.train --config=experiments/policy_gradient/dr_grpo.py --workdir=runs/dr_grpo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.constant_length, length=5),
    ),
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
