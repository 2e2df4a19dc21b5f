"""Demonstration-regularised RL (arXiv:2310.17303): reinforce with a KL to the imitator.

R_i = r_i - 0.1 sum_t k1_t to the policy that the demonstrations taught; A_i = R_i - mean of the
other rows of the group; loss = mean over sequences of -A log pi(y). The optimum is worth at least
V(expert) - 0.1 KL(expert || imitator), and better the better the imitator is. Ours: KL of sampled
rows in the reward, where it has the right gradient; the imitator is the warm start.

Confidence: PAPER (method), DERIVED (bound).
Card: 72.

    python -m polgrad.train --config=experiments/policy_gradient/demo_regularized.py \\
      --workdir=runs/demo_regularized
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.leave_one_out), kl_coefficient=0.1),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
