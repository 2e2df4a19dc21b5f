"""REINFORCE++ (arXiv:2501.03262): no groups, advantages whitened over all tokens of the batch.

A_t = whiten(R - beta sum_{k >= t} k1_k) with k1 = log pi_old - log reference and R on the last
token; loss = -token mean of min(r A, clip(r, 0.8, 1.2) A). The KL penalty to go has the gradient
of KL(pi, reference) of whole sequences. beta is ours, to matter in five tokens. Whitening
counts tokens, so long rows weigh more.
Confidence: CODE (formula), MEMORY (beta).
Card: S4.

    python -m polgrad.train --config=experiments/policy_gradient/reinforce_plus_plus.py \\
      --workdir=runs/reinforce_plus_plus
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(
      credit.reward_to_go,
      discount=1.0,
      normalizer=part(advantages.whiten, eps=1e-8),
      kl_coefficient=0.01,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
