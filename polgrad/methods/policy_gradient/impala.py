from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def impala(
  *,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
  value_coefficient: float = 0.5,
  entropy_coefficient: float = 0.001,
) -> Method:
  """IMPALA (arXiv:1802.01561): an actor-critic on stale rollouts, corrected by V-trace.

      v_t = V_t + min(rho_bar, rho_t) (r_t + V_{t+1} - V_t) + min(c_bar, rho_t) (v_{t+1} - V_{t+1})
      A_t = min(rho_bar, rho_t) (r_t + v_{t+1} - V_t)
      loss = token mean of -A log pi + value_coefficient (V - v)^2 / 2 - entropy_coefficient H

  r_t is the reward at token t, rho = pi_old / pi_behavior, and H the entropy of the next token.
  pi_behavior is the policy that sampled, and pi_old the policy when training on the rollout begins.
  There is one update per rollout, so pi_old is the policy that is updated, and the surrogate needs
  no ratio besides the one in A.

  Differences: The paper sums over tokens, discounts by 0.99, and has other coefficients and
  RMSProp. Rollouts are four batches old (lag=4).

  Args:
    rho_bar: largest ratio in the error of the value and in the advantage.
    c_bar: largest ratio in the trace.
    value_coefficient: of the value error.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE (targets), MEMORY (coefficients).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(
      credit.vtrace, discount=1.0, trace=1.0, rho_bar=rho_bar, c_bar=c_bar, rho_pg=rho_bar
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.value_error)),
        'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy)),
      },
    ),
  )
