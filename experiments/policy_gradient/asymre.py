"""AsymRE (arXiv:2506.20520): off-policy REINFORCE with a baseline below the mean reward.

loss = -token mean of (R - group mean + 0.1) log pi: good rows count more than bad ones, and
off-policy data do not collapse the policy. A baseline lowered by s is exactly s times supervised
learning on what was sampled, and so it is written here. Ours: rollouts are four batches old.
Confidence: CODE (formula), MEMORY (shifts other than 0.1).
Card: 0.

    python -m polgrad.train --config=experiments/policy_gradient/asymre.py --workdir=runs/asymre
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={'shift': weighted(0.1, part(penalties.nll))},
    ),
    minibatches=4,
    rollouts={'lag': 4},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
