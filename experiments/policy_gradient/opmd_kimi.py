"""OPMD-Kimi (arXiv:2501.12599): REINFORCE with a squared log-ratio to the old policy, token by token.

loss = token mean of -A log pi + tau / 2 (log pi - log pi_old)^2, A = R - group mean: tau log Z of
the mirror-descent regression is replaced by the mean reward, so the policy at rest is not the
tilted old one. The paper squares the log-ratio of the whole answer (`opmd_kimi_sequence`); per
token is what Trinity-RFT has. tau = 0.1 is ours, none is published. Ours also: rollouts are four
batches old.
Confidence: CODE (token form), PAPER (centre), DERIVED (fixed point).
Card: S22.

    python -m polgrad.train --config=experiments/policy_gradient/opmd_kimi.py --workdir=runs/opmd_kimi
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
