from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def impala() -> Method:
  """IMPALA (arXiv:1802.01561): an actor-critic on stale rollouts, corrected by V-trace.

  A_t = min(1, rho_t) (r_t + v_{t+1} - V_t), rho = pi_old / pi_behavior, v the V-trace target; loss =
  token mean of -A log pi + 0.5 * (V - v)^2 / 2 - 0.001 * entropy. The ratio stands inside the
  advantage, so the surrogate has none. One update a rollout, so pi_old is the live policy. The paper
  sums over tokens, discounts by 0.99 and has other coefficients and RMSProp.
  Confidence: CODE (targets), MEMORY (coefficients).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.vtrace, discount=1.0, trace=1.0, rho_bar=1.0, c_bar=1.0, rho_pg=1.0),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(0.5, part(penalties.value_error)),
        'entropy': weighted(0.001, part(penalties.negative_entropy)),
      },
    ),
  )
