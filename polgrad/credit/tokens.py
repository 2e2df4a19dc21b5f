"""Credit of tokens: advantages that differ between the tokens of one turn."""

from polgrad.credit.base import Estimator, critic, kl_requires, token_rewards, with_targets
from polgrad.losses import returns
from polgrad.losses.advantages import NormalizerPart, whiten
from polgrad.registry import Fraction, NotNegative


def decoupled(
  *,
  discount: float = 1.0,
  trace: Fraction = 0.95,
  value_trace: Fraction = 1.0,
  length_scale: NotNegative = 0.0,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """GAE with one lambda for the policy and another for the critic (VC-PPO, arXiv:2503.01491).

  Advantages have the lambda `trace`, targets of the critic `value_trace`. With value_trace = 1 a target
  is the sum of the rewards from the token on, which has no bias: a critic that is wrong everywhere by
  the same number does not stay so. With `length_scale` > 0 the lambda of the policy is that of
  `returns.length_adaptive_trace` (VAPO, arXiv:2504.05118), and `trace` is not read.

  Args:
    discount: factor of rewards and values that are one token later.
    trace: lambda of the advantages.
    value_trace: lambda of the targets.
    length_scale: alpha of 1 - 1 / (alpha L), with L the tokens of the row; 0: lambda is `trace`.
    normalizer: of the advantages.
    kl_coefficient: of a penalty in the reward of every token, log pi - log reference in nats.
  """

  def apply(batch, state):
    rewards, values = token_rewards(batch, kl_coefficient), batch.old_values
    own = trace
    if length_scale:
      own = returns.length_adaptive_trace(batch.mask, scale=length_scale)
    advantages, errors = (
      returns.gae(rewards, values, batch.mask, discount=discount, trace=x)
      for x in (own, value_trace)
    )
    return with_targets(batch, advantages, errors + values, normalizer), state

  return critic(apply, kl_requires(kl_coefficient))
