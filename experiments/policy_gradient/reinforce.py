"""REINFORCE (Williams 1992): the score-function estimator with a moving baseline.

loss = -mean over sequences of A * log pi(y), A = R - b, b the moving average of earlier mean
rewards. The estimator is exactly unbiased.
Confidence: CODE.
Card: S1.

    python -m polgrad.train --config=experiments/policy_gradient/reinforce.py --workdir=runs/reinforce
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.moving_baseline, decay=0.9),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
