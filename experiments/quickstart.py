"""The quickstart: a small transformer learns two-digit addition on a CPU.

A short supervised phase brings it to between 10% and 50% greedy accuracy on held-out problems. GRPO
(arXiv:2402.03300) without KL, with DAPO's clip-higher and dynamic sampling (arXiv:2503.14476), then
takes it to at least 90%. It samples at temperature 0.7, and all log-probs are taken at that
temperature. Options: seed.

    make quickstart
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, seed=0, steps=350, smoke=False)
  minibatches = 4
  decay = part(optim.linear, warmup=20, steps=o.steps * minibatches, end=0.1)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
    ),
    optimizer=part(optim.adamw, learning_rate=5e-4, b2=0.99, schedule=decay),
    prompts=64,
    rollouts={'temperature': 0.7, 'max_resamples': 2},
    minibatches=minibatches,
    steps=o.steps,
  )
  return arithmetic_experiment({'sft': warm_start(), 'grpo': phase}, seed=o.seed, smoke=o.smoke)
