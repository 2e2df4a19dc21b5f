from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, reward_penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def correlated_proxies(*, divergence_coefficient: float = 0.03, limit: float = 10.0) -> Method:
  """Correlated proxies (arXiv:2403.03185): the root of chi^2 to a reference is paid in the reward.

      R_i = r_i - divergence_coefficient (rho_i - 1) / sqrt(chi^2)
      A_i = R_i - mean of the other rows of the group
      loss = -mean over sequences of A_i log pi(y_i)

  rho = pi / reference is the ratio of the whole row, clipped to [1 / limit, limit], and chi^2 is
  estimated from the batch. On-policy, the loss descends divergence_coefficient
  sqrt(chi^2(pi || reference)). This divergence bounds how far the true reward can fall behind a
  proxy that correlates with it under the reference.

  Differences: Ratios are those of rows of tokens instead of occupancies of states. The ratio is
  clipped, while the bound holds for the unclipped one. The coefficient and the leave-one-out
  baseline are ours.

  Args:
    divergence_coefficient: of the penalty, in units of the reward.
    limit: largest ratio of a row; the smallest is 1 / limit.

  Confidence: CODE (control form), DERIVED (language models).
  """
  return Method(
    collect=partial(collect.Rollouts, recompute_proximal=True),
    credit=part(
      credit.outcome,
      advantage=part(advantages.leave_one_out),
      costs={
        'chi': weighted(divergence_coefficient, part(reward_penalties.root_chi_square, limit=limit))
      },
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
