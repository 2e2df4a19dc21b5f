"""HARPG (arXiv:2302.01734): momentum that a product with the Hessian carries along.

d = (1 - eta) (d + v) + eta g(theta), v = H(theta_hat) (theta - theta_before), theta_hat a random
point between both, eta_t = 2 / (t + 2); theta += gamma d / ||d|| (the normalised form, N-HARPG).
Loss = mean over rows of -A prod_t r_t with the live ratio of the whole row, since it is
differentiated twice where r = 1. Two updates, each with its own rollout, make one step. Ours: a
batch for one trajectory, the leave-one-out baseline, and short steps: the noise of v grows with
them and adds up in d.

Confidence: PAPER (updates), MEMORY (schedules).
Card: 105.

    python -m polgrad.train --config=experiments/policy_gradient/harpg.py --workdir=runs/harpg
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.leave_one_out)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      ratio=part(ratios.sequence_product),
      aggregation=part(aggregation.sequence_mean),
    ),
    optimizer=part(
      optim.harpg,
      learning_rate=0.01,
      schedule=part(optim.linear, steps=o.steps, end=0.1),
      exponent=1.0,
      normalize=True,
    ),
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
