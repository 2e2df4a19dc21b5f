"""SAPO (arXiv:2511.20347): a trust region without an edge.

loss = -mean over sequences of token means of (4 / tau) sigmoid(tau (r - 1)) A, tau = 1 for A > 0
and 1.05 otherwise; w = 4 p (1 - p) r A with p the sigmoid. The weight is A on-policy and decays
smoothly where PPO cuts, faster for bad tokens.
Confidence: CODE.
Card: S14.

    python -m polgrad.train --config=experiments/policy_gradient/sapo.py --workdir=runs/sapo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.soft_gated, tau_positive=1.0, tau_negative=1.05),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
