"""VESPO (arXiv:2602.10693): rows fade out smoothly as their sequence ratio leaves 1.

W = prod_t pi / pi_old of the row; loss = -token mean of sg(W^k exp(lam (1 - W))) A log pi, (k,
lam) = (2, 3) for A >= 0 and (3, 2) for A < 0. The weight is 1 on-policy and largest at W = k /
lam, and it decays on both sides of that: a row that the policy has left fades out, a good one that
has become likelier first. pi_old is the sampler, four batches old.
Confidence: CODE.
Card: S28.

    python -m polgrad.train --config=experiments/policy_gradient/vespo.py --workdir=runs/vespo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      ratio=part(ratios.sequence_product),
      aggregation=part(aggregation.token_mean),
      weights={
        'gamma': part(
          weights.gamma_shaped,
          power_positive=2.0,
          rate_positive=3.0,
          power_negative=3.0,
          rate_negative=2.0,
        )
      },
    ),
    rollouts={'lag': 4},
    minibatches=4,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
