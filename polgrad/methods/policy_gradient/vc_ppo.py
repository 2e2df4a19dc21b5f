from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def vc_ppo(
  *,
  eps: float = 0.2,
  trace: float = 0.95,
  value_coefficient: float = 0.5,
  value_steps: int = 50,
  value_rate: float = 1e-4,
) -> Method:
  """VC-PPO (arXiv:2503.01491): PPO with a critic that is trained first, and with two lambdas.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A) + value_coefficient (V - G)^2 / 2

  r = pi / pi_old. A is GAE with lambda = `trace`, whitened over the batch. G is the sum of the rewards
  from the token on (lambda = 1), so the critic's own errors are not part of its targets. In the phase
  `value_pretraining` the policy samples and only the critic learns, from the same targets. Without it
  PPO begins with a critic that knows nothing: with a lambda below 1 the error of its first differences
  lowers late tokens against early ones. Each batch is used for two minibatches.

  Differences: The critic is a scalar head on the hidden states of the policy. Before PPO only this head
  is trained, so the policy does not change; after that, its error moves the states too. The paper's
  critic is a second model. The number of steps before PPO and their learning rate are ours.

  Args:
    eps: distance of the clipping bounds from 1.
    trace: lambda of the policy.
    value_coefficient: of the value error.
    value_steps: batches that only the critic learns from.
    value_rate: learning rate of the head in these steps.

  Confidence: PAPER (second-hand account).
  """
  return Method(
    before={'value_pretraining': pretraining(value_steps, value_rate)},
    credit=part(credit.decoupled, trace=trace, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'value': weighted(value_coefficient, part(penalties.value_error))},
    ),
    minibatches=2,
  )


def pretraining(steps: int, learning_rate: float) -> Method:
  """The phase in which the scalar head alone learns the sum of the rewards from each token on."""
  return Method(
    credit=part(credit.decoupled),
    objective=part(
      objectives.Supervised,
      loss=part(penalties.value_error),
      aggregation=part(aggregation.token_mean),
    ),
    optimizer=part(optim.adamw, learning_rate=learning_rate, only='value_head$'),
    steps=steps,
  )
