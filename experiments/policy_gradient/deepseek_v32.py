"""DeepSeek-V3.2 (arXiv:2512.02556): off-policy rows must be near or good; an unbiased KL.

loss = mean over sequences of token means of -M min(r A, clip(r, 0.8, 1.2) A) + 0.001 r k3, with A
= R - mean_g, M = 1 in rows with A >= 0 or mean_t(log pi_old - log pi) <= 0.5, else 0. r k3 with
its gradient through r too is -r log(pi / reference): KL(pi, reference) for tokens of the old
policy, which is the sampler here. The limit is TRL's and the coefficient of the KL ours; the paper
states neither.
Confidence: CODE (formula), MEMORY (limit, coefficient of the KL).
Card: S28, S20.

    python -m polgrad.train --config=experiments/policy_gradient/deepseek_v32.py \\
      --workdir=runs/deepseek_v32
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates, weights
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.sequence_mean),
      weights={'opsm': part(weights.near_or_positive, limit=0.5)},
      penalties={'kl': weighted(0.001, part(penalties.importance_k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    rollouts={'lag': 4},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
