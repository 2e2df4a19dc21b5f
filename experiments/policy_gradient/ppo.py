"""PPO (arXiv:1707.06347): clipped ratios and a value head, advantages by GAE (arXiv:1506.02438).

loss = -token mean of min(r A, clip(r) A) + 0.5 * clipped value error - 0.001 * entropy; two epochs
of two minibatches. The value head reads the policy's own hidden states.
Confidence: CODE (formula as in verl).
Card: S6.

    python -m polgrad.train --config=experiments/policy_gradient/ppo.py --workdir=runs/ppo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.generalized, discount=1.0, trace=0.95, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(0.5, part(penalties.clipped_value_error, eps=0.2)),
        'entropy': weighted(0.001, part(penalties.negative_entropy)),
      },
    ),
    epochs=2,
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment(
    {'sft': warm_start(), 'rl': phase}, smoke=o.smoke, model={'value_head': True}
  )
