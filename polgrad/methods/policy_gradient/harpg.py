from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def harpg(*, steps: int, step_size: float = 0.01, exponent: float = 1.0) -> Method:
  """HARPG (arXiv:2302.01734): momentum that is moved to the iterate by a product with the Hessian.

      d = (1 - eta_t) (d + v) + eta_t g(theta),   eta_t = (2 / (t + 2))^exponent
      v = H(theta_hat) (theta - previous theta)
      theta += gamma_t d / ||d||

  g and H are the gradient and the Hessian of the mean over rows of A prod_t r_t. A is the reward
  minus the mean of the other rows of the group, and prod_t r_t the ratio of the whole row, which is
  1 but is differentiated twice. theta_hat is a random point between the last two theta. gamma_t
  falls linearly from `step_size` to a tenth of it over the run. The normalised step makes this
  N-HARPG. One step takes two updates, each with its own rollout: one at theta for g, one at
  theta_hat for v.

  Differences: Gradient and Hessian are taken over a batch of answers instead of one trajectory, and
  there is a baseline. Steps are short, because the noise of v grows with them and adds up in d.

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
      surrogate=part(surrogates.importance_weighted),
      ratio=part(ratios.sequence_product),
      aggregation=part(aggregation.sequence_mean),
    ),
    optimizer=part(
      optim.harpg,
      learning_rate=step_size,
      schedule=part(optim.linear, steps=steps, end=0.1),
      exponent=exponent,
      normalize=True,
    ),
  )
