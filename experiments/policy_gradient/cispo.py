"""CISPO (arXiv:2506.13585): the importance weight is truncated and detached; no token is dropped.

loss = -token mean of sg(min(r, 5)) A log pi. The cap is the ratio itself, that of ScaleRL
(arXiv:2510.13786); the paper does not state its own. There is no lower bound and no KL.
Confidence: CODE.
Card: S11.

    python -m polgrad.train --config=experiments/policy_gradient/cispo.py --workdir=runs/cispo
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
      surrogate=part(surrogates.truncated, cap=5.0, floor=0.0),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
