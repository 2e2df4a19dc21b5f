"""N-PG-IGT (arXiv:2302.01734): normalised steps along transported momentum.

d = (1 - eta) d + eta g(theta_tilde), theta += gamma d / ||d||, eta_t = (2 / (t + 2))^0.8;
trajectories are sampled, and the gradient of the mean of -A log pi(y) taken, at theta_tilde =
theta + ((1 - eta) / eta) times the last move. Ours: a batch for one trajectory, and the
leave-one-out baseline. theta_tilde is what is evaluated and saved. One update a rollout.

Confidence: PAPER (updates), MEMORY (schedules).
Card: 105.

    python -m polgrad.train --config=experiments/policy_gradient/n_pg_igt.py \\
      --workdir=runs/n_pg_igt
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  phase = addition_phase(
    credit=part(credit.outcome, advantage=part(advantages.leave_one_out)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    optimizer=part(
      optim.normalized_igt,
      learning_rate=0.02,
      schedule=part(optim.linear, steps=o.steps, end=0.1),
      exponent=0.8,
    ),
    steps=o.steps,
    samples_per_prompt=o.group,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
