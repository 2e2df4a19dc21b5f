"""CAPO (arXiv:2510.00819): tokens whose own step would jump or leave the policy are left out.

loss = mean over sequences of the mean of -r A over kept tokens. A token is kept if its own step in
the last layer changes the objective by less than 0.01 and the policy by less than 1e-4 nats, to
second order with eta = 1.5e-5. Dropped tokens also leave the denominator, as in the authors' code.
Ours: the step of gradient descent for Adam's, and the whole vocabulary for the top k.

Confidence: CODE (rule, constants), DERIVED (curvature).
Card: 118.

    python -m polgrad.train --config=experiments/policy_gradient/capo.py --workdir=runs/capo
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, selections, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  kept = part(
    selections.curvature, learning_rate=1.5e-5, limit_objective=0.01, limit_divergence=1e-4
  )
  statistics = (logit_stats.score_norm, logit_stats.score_fisher, logit_stats.hidden_norm)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.sequence_mean),
      selections={'kept': kept},
      only='kept',
    ),
    rollouts={'stats': {s.__name__: part(s) for s in statistics}},
    minibatches=2,
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
