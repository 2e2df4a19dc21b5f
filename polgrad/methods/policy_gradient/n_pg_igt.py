from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def n_pg_igt(*, steps: int) -> Method:
  """N-PG-IGT (arXiv:2302.01734): normalised steps along transported momentum.

  d = (1 - eta) d + eta g(theta_tilde), theta += gamma d / ||d||, eta_t = (2 / (t + 2))^0.8;
  trajectories are sampled, and the gradient of the mean of -A log pi(y) taken, at theta_tilde =
  theta + ((1 - eta) / eta) times the last move. Ours: a batch for one trajectory, and the
  leave-one-out baseline. theta_tilde is what is evaluated and saved. One update a rollout.

  Confidence: PAPER (updates), MEMORY (schedules).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.leave_one_out)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    optimizer=part(
      optim.normalized_igt,
      learning_rate=0.02,
      schedule=part(optim.linear, steps=steps, end=0.1),
      exponent=0.8,
    ),
  )
