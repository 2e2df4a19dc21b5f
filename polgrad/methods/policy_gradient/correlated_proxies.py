from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, reward_penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def correlated_proxies() -> Method:
  """Correlated proxies (arXiv:2403.03185): the root of chi^2 to the reference is paid in the reward.

  R_i = r_i - c (rho_i - 1) / sqrt(chi^2), rho = pi / reference of the whole row within [0.1, 10],
  chi^2 the batch's estimate; on-policy the loss -A log pi then descends c sqrt(chi^2(pi ||
  reference)), which bounds how far the true reward may fall behind a proxy that correlates with it
  under the reference. Ours: rows of tokens for occupancies of states, a clipped ratio (the bound is
  of the unclipped one), c = 0.03, and the leave-one-out baseline.

  Confidence: CODE (control form), DERIVED (language models).
  """
  return Method(
    collect=partial(collect.Rollouts, recompute_proximal=True),
    credit=part(
      credit.outcome,
      advantage=part(advantages.leave_one_out),
      costs={'chi': weighted(0.03, part(reward_penalties.root_chi_square, limit=10.0))},
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
