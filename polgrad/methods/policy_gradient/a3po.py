from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, ratios, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def a3po(*, eps: float = 0.2, cap: float = 5.0) -> Method:
  """A-3PO (arXiv:2512.06547): decoupled PPO whose proximal policy is interpolated, not computed.

      log pi_prox = sg(alpha log pi_behavior + (1 - alpha) log pi),   alpha = 1 / max(staleness, 1)
      loss = -token mean of sg(rho 1[rho <= cap]) min(r A, clip(r, 1 - eps, 1 + eps) A)

  r = pi / pi_prox, rho = pi_prox / pi_behavior, and A is the group-normalised reward. pi_behavior
  is the policy that sampled, and the staleness is the number of updates since then. r rho is
  pi / pi_behavior for every alpha. The older a row, the closer its r is to 1, and the later it is
  clipped. pi_prox needs no forward pass. A token whose rho is above the cap is dropped.

  Differences: Rollouts are four batches old (lag=4). The cap on rho is that of AReaL. Its other
  mode truncates rho: weight `truncated_importance`, cap=5.

  Args:
    eps: distance of the clipping bounds from 1.
    cap: largest importance weight of a token that is kept.

  Confidence: CODE (formula), MEMORY (cap).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      proximal=part(ratios.interpolated),
      weights={'behavior': part(weights.masked_importance, low=0.0, high=cap)},
    ),
    minibatches=4,
  )
