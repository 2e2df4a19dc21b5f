"""DRO per token (arXiv:2405.19107): REINFORCE with a squared log-ratio to the old policy, as in verl.

loss = token mean of -A log pi + beta / 2 (log pi - log pi_old)^2, A = R - group mean, beta = 0.1.
The paper regresses whole answers on a learned value (`dro_v`) and has no such form. Ours: rollouts
are four batches old, and pi_old is the policy that sampled.
Confidence: CODE (formula), MEMORY (beta).
Card: S24.

    python -m polgrad.train --config=experiments/policy_gradient/dro.py --workdir=runs/dro
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
      penalties={'mirror': weighted(0.1, part(penalties.squared_log_ratio))},
    ),
    minibatches=4,
    rollouts={'lag': 4},
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
