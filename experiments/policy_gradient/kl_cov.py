"""KL-Cov (arXiv:2505.22617): the tokens that sharpen the policy most are held at the old policy.

loss = token mean of -r A + 1.0 |log r| on selected tokens: the share of the minibatch's tokens (at
least one) with the largest (A - mean A)(log pi - mean log pi), which to first order is what lowers
the entropy. No clip. On the first minibatch log r = 0 and the penalty has no gradient. Ours: a
share of 0.02 for 0.002, since minibatches are small.

Confidence: CODE.
Card: 133.

    python -m polgrad.train --config=experiments/policy_gradient/kl_cov.py --workdir=runs/kl_cov
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, selections, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.top_covariance, share=0.02)},
      penalties={'kl': weighted(1.0, part(penalties.selected_absolute))},
    ),
    minibatches=4,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
