from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def retrace() -> Method:
  """Retrace (arXiv:1606.02647): traces cut by min(1, rho) teach the critic of a policy gradient.

  G_t = r_t + V_{t+1} + c_{t+1} (G_{t+1} - V_{t+1}), c = 0.95 min(1, rho), rho = pi_old /
  pi_behavior; A = whiten(G - V); loss = -token mean of sg(min(rho, 2)) min(r A, clip(r, 0.8, 1.2) A)
  + 0.5 * (V - G)^2 / 2. The paper learns Q(s, a) and has no policy gradient: V stands for Q here,
  and the actor is that of `tis.py`.
  Confidence: CODE (targets), DERIVED (V in the place of Q).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.retrace, discount=1.0, trace=0.95, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.truncated_importance, cap=2.0)},
      penalties={'value': weighted(0.5, part(penalties.value_error))},
    ),
    minibatches=2,
  )
