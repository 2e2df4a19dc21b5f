"""GSPO (arXiv:2507.18071): the ratio of a sequence is the geometric mean of its tokens'.

s_i = exp(mean_t log_ratio); loss = mean over sequences of -min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A),
written token by token (GSPO-token), which has the same value and gradient when A is one number a
sequence. Peers that aggregate by token mean weigh long sequences more.
Confidence: CODE (formula as in verl and TRL).
Card: S10.

    python -m polgrad.train --config=experiments/policy_gradient/gspo.py --workdir=runs/gspo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=3e-4, eps_high=4e-4),
      ratio=part(ratios.sequence_geometric),
      aggregation=part(aggregation.sequence_mean),
    ),
    minibatches=4,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
