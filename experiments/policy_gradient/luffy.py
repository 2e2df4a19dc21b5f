"""LUFFY (arXiv:2504.14945): a demonstration in every group, learned from by a shaped probability.

A_i is group-normalised over samples and demonstration together. Samples have the clipped loss, the
demonstration -A p / (p + 0.1), p = pi(token), whose gradient has the weight 0.1 p / (p + 0.1)^2:
most where the policy finds a token unlikely, not impossible. Both are sums over one constant, so a
token weighs the same in both. Ours: one demonstration for 8 samples, and a constant for the number
of tokens.

Confidence: CODE (shaping, weight), MEMORY (the normalisers).
Card: 16.

    python -m polgrad.train --config=experiments/policy_gradient/luffy.py --workdir=runs/luffy
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  budget = part(aggregation.constant_length, length=5)
  demonstration = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.probability_shaped, gamma=0.1),
    aggregation=budget,
  )
  sampled = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
    aggregation=budget,
  )
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, demonstration), 'sampled': weighted(1.0, sampled)},
    ),
    rollouts={'demonstrations': 1},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
