"""TOPR (arXiv:2503.14286): good answers as in supervised learning, bad ones by a truncated ratio.

loss = -mean over rows of w R log pi(y), R = 1 or -1, without a baseline; w = 1 if R > 0, else
min(pi(y) / pi_old(y), 1), the ratio of the whole answer: the less likely a bad answer has become,
the less it is pushed down. Ours: rollouts are four batches old, and pi_old is the policy that
sampled, and the rate is 2e-5: without a baseline most rows are pushed down, and at 1e-4 accuracy
fell from 0.43 to 0.22 in 24 batches.
Confidence: PAPER (formula and bounds).
Card: 64.

    python -m polgrad.train --config=experiments/policy_gradient/topr.py --workdir=runs/topr
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.raw)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      ratio=part(ratios.sequence_product),
      aggregation=part(aggregation.sequence_sum),
      weights={
        'taper': part(
          weights.tapered,
          positive_low=1.0,
          positive_high=1.0,
          negative_low=0.0,
          negative_high=1.0,
        )
      },
    ),
    # R is 1 for a right answer and -1 for a wrong one; the pattern fits every text.
    reward={
      'exact': weighted(2.0, part(verifiers.exact_match)),
      'offset': weighted(-1.0, part(verifiers.regex_format, pattern='.*')),
    },
    learning_rate=2e-5,
    minibatches=4,
    rollouts={'lag': 4},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
