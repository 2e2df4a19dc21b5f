from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def retrace(
  *, eps: float = 0.2, trace: float = 0.95, cap: float = 2.0, value_coefficient: float = 0.5
) -> Method:
  """Retrace (arXiv:1606.02647): traces cut by min(1, rho) teach the critic of a policy gradient.

      G_t = r_t + V_{t+1} + c_{t+1} (G_{t+1} - V_{t+1}),   c = trace min(1, rho)
      loss = -token mean of sg(min(rho, cap)) min(r A, clip(r, 1 - eps, 1 + eps) A)
             + value_coefficient (V - G)^2 / 2

  r_t is the reward at token t, rho = pi_old / pi_behavior, r = pi / pi_old and A = whiten(G - V).
  pi_behavior is the policy that sampled, and pi_old the policy when training on the rollout begins.

  Differences: The paper learns Q(s, a) and has no policy gradient. Here V takes the place of Q, and
  the policy is trained as in `tis`. Rollouts are four batches old (lag=4).

  Args:
    eps: distance of the clipping bounds from 1.
    trace: lambda of Retrace.
    cap: largest importance weight of the policy's loss.
    value_coefficient: of the value error.

  Confidence: CODE (targets), DERIVED (V in the place of Q).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4, recompute_proximal=True),
    credit=part(credit.retrace, discount=1.0, trace=trace, normalizer=part(advantages.whiten)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      weights={'mismatch': part(weights.truncated_importance, cap=cap)},
      penalties={'value': weighted(value_coefficient, part(penalties.value_error))},
    ),
    minibatches=2,
  )
