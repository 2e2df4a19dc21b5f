from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, ratios, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def harpg(*, steps: int) -> Method:
  """HARPG (arXiv:2302.01734): momentum that a product with the Hessian carries along.

  d = (1 - eta) (d + v) + eta g(theta), v = H(theta_hat) (theta - theta_before), theta_hat a random
  point between both, eta_t = 2 / (t + 2); theta += gamma d / ||d|| (the normalised form, N-HARPG).
  Loss = mean over rows of -A prod_t r_t with the live ratio of the whole row, since it is
  differentiated twice where r = 1. Two updates, each with its own rollout, make one step. Ours: a
  batch for one trajectory, the leave-one-out baseline, and short steps: the noise of v grows with
  them and adds up in d.

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
      learning_rate=0.01,
      schedule=part(optim.linear, steps=steps, end=0.1),
      exponent=1.0,
      normalize=True,
    ),
  )
