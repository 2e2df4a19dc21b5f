"""MDPO (arXiv:2005.09814): every rollout is one step of mirror descent, solved by several updates.

loss = token mean of -r A + (1 / t_k) KL(pi || pi_old), t_k = 1 - (k - 1) / K at rollout k of K.
The KL is exact, over the vocabulary at each token; pi_old is the anchor `teacher`, which follows
the policy after the updates of a rollout. They lead towards pi_old exp(t_k A), and the first of
them is the plain policy gradient. Ours: 4 updates for 10, whitened rewards of the group for GAE, a
constant learning rate.

Confidence: CODE (on-policy form), DERIVED (per token of a language model).
Card: 2.

    python -m polgrad.train --config=experiments/policy_gradient/mdpo.py --workdir=runs/mdpo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, divergences, surrogates
from polgrad.registry import part, weighted


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  updates = 4
  phase = addition_phase(
    credit=part(
      credit.outcome,
      advantage=part(advantages.group_mean),
      normalizer=part(advantages.whiten),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(1.0, part(divergences.reverse_kl))},
      schedules={'kl': part(optim.inverse_linear, steps=o.steps, every=updates)},
    ),
    anchors={'teacher': part(optim.sync, every=updates)},
    optimizer=part(optim.adamw, learning_rate=1e-4, max_grad_norm=0.5),
    epochs=updates,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
