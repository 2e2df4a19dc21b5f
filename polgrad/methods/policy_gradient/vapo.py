from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.methods.policy_gradient.vc_ppo import pretraining
from polgrad.registry import part, weighted


def vapo(
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.28,
  length_scale: float = 0.05,
  imitation: float = 0.1,
  value_coefficient: float = 0.5,
  value_steps: int = 50,
  value_rate: float = 1e-4,
) -> Method:
  """VAPO (arXiv:2504.05118): VC-PPO whose lambda grows with the length, and imitation of right rows.

      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
             + value_coefficient (V - G)^2 / 2
             + imitation (mean of -log pi over the tokens of rows with a reward above 1/2)

  r = pi / pi_old. A is GAE with lambda = 1 - 1 / (length_scale L) in a row of L tokens, whitened over
  the batch; the reward at the end then counts for the same fraction of a long row and of a short one. G
  is the sum of the rewards from the token on (lambda = 1). A phase in which only the critic learns comes
  first, as in `vc_ppo`. Each batch is used for two minibatches.

  Differences: As in `vc_ppo`, the critic is a head of the policy. Rows of at most 1 / length_scale
  tokens (20) have lambda = 0, where the formula would be negative; use `vc_ppo` for such tasks.

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    length_scale: alpha in the paper.
    imitation: weight of the log-likelihood of right rows.
    value_coefficient: of the value error.
    value_steps: batches that only the critic learns from, before PPO.
    value_rate: learning rate of the head in these steps.

  Confidence: PAPER (second-hand account).
  """
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
    aggregation=part(aggregation.token_mean),
    penalties={'value': weighted(value_coefficient, part(penalties.value_error))},
  )
  imitate = part(objectives.Supervised, aggregation=part(aggregation.token_mean), only='rewards')
  streams = {'policy': weighted(1.0, reinforce), 'right': weighted(imitation, imitate)}
  return Method(
    before={'value_pretraining': pretraining(value_steps, value_rate)},
    credit=part(credit.decoupled, length_scale=length_scale, normalizer=part(advantages.whiten)),
    objective=part(objectives.WeightedSum, streams=streams),
    minibatches=2,
  )
