"""OPO (arXiv:2505.23585): on-policy REINFORCE with the length-weighted baseline.

b = sum_j L_j R_j / sum_j L_j over the group; loss = -mean over sequences of (R - b) log pi(y). The
baseline of least variance if the squared gradient norm of a row grows like its length L. One
update a rollout, no clip, no KL, as in the paper. Answers of the task have two or three digits, so
lengths differ little.
Confidence: PAPER.
Card: S1.

    python -m polgrad.train --config=experiments/policy_gradient/opo.py --workdir=runs/opo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(baselines.length_weighted)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
