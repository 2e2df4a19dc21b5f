"""HPT (arXiv:2509.04419): prompts that no sample solves imitate, all others reinforce.

A prompt with at most 0 solved samples of 8 keeps its demonstration only, loss -log pi(token) with
weight 1; any other its samples only, loss -A log pi with A = R - mean of the group, a constant in
place of lengths, no clip, and 0.001 of entropy. Ours: imitation is the mean over the tokens of the
demonstrations in use, whose number shrinks as the policy learns.

Confidence: CODE (gate, losses, constants).
Card: 16.

    python -m polgrad.train --config=experiments/policy_gradient/hpt.py --workdir=runs/hpt
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  imitate = part(objectives.Supervised, aggregation=part(aggregation.token_mean))
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.reinforce),
    aggregation=part(aggregation.constant_length, length=5),
    penalties={'entropy': weighted(0.001, part(penalties.negative_entropy))},
  )
  outcome = part(credit.outcome, advantage=part(advantages.group_mean))
  phase = addition_phase(
    credit=part(credit.gated, credit=outcome, limit=0, threshold=1.0),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, imitate), 'sampled': weighted(1.0, reinforce)},
    ),
    rollouts={'demonstrations': 1},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
