"""The quickstart: a small transformer learns two-digit addition on a CPU.

A short supervised phase brings it to between 10% and 50% greedy accuracy on held-out problems; GRPO
(arXiv:2402.03300) without KL then takes it to at least 90%. Options: seed.

    make quickstart
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, seed=0, steps=200, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.policy_gradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
    steps=o.steps,
  )
  return arithmetic_experiment({'sft': warm_start(), 'grpo': phase}, seed=o.seed, smoke=o.smoke)
