from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def n_pg_igt(*, steps: int, step_size: float = 0.02, exponent: float = 0.8) -> Method:
  """N-PG-IGT (arXiv:2302.01734): normalised steps along momentum that is moved to the iterate.

      d = (1 - eta_t) d + eta_t g(theta_tilde),   eta_t = (2 / (t + 2))^exponent
      theta += gamma_t d / ||d||
      theta_tilde = theta + ((1 - eta_{t+1}) / eta_{t+1}) (last change of theta)

  g is the gradient of the mean over rows of A log pi(y), A the reward minus the mean of the other
  rows of the group. gamma_t falls linearly from `step_size` to a tenth of it over the run. The
  policy has the parameters theta_tilde: it samples with them, and they are evaluated and saved.
  There is one update per rollout.

  Differences: A gradient is taken over a batch of answers instead of one trajectory, and there is a
  baseline.

  Args:
    steps: number of rollouts; the run fills it in.
    step_size: first length of a step of theta, in the norm of all parameters together.
    exponent: how fast eta_t falls.

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
      learning_rate=step_size,
      schedule=part(optim.linear, steps=steps, end=0.1),
      exponent=exponent,
    ),
  )
