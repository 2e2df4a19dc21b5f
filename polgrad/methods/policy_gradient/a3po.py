from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def a3po() -> Method:
  """A-3PO (arXiv:2512.06547): decoupled PPO whose proximal policy is interpolated, not computed.

  log pi_prox = sg(alpha log pi_behavior + (1 - alpha) log pi), alpha = 1 / max(staleness, 1); loss
  as in `decoupled_ppo.py` with r = pi / pi_prox and rho = pi_prox / pi_behavior. The product is pi /
  pi_behavior for every alpha; the older a row, the later it is clipped. No forward pass is spent on
  pi_prox. Cap 5 on rho as in AReaL.
  Confidence: CODE (formula), MEMORY (cap).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      proximal=part(ratios.interpolated),
      weights={'behavior': part(weights.truncated_importance, cap=5.0)},
    ),
    minibatches=4,
  )
