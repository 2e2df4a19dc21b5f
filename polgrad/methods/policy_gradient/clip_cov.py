from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates, trust_region_masks
from polgrad.methods.base import Method
from polgrad.registry import part


def clip_cov() -> Method:
  """Clip-Cov (arXiv:2505.22617): some of the tokens that sharpen the policy most are dropped.

  loss = token mean of -min(r A, clip(r, 0, 2) A), but 0 for selected tokens: those with 1 < (A -
  mean A) (log pi - mean log pi) < 5 that are not clipped already, of which a share of the
  minibatch's tokens (at least one) is drawn at random. To first order this covariance is what lowers
  the entropy. Ours: a share of 0.002 for 0.0002, since minibatches are small.

  Confidence: CODE.
  """
  bounds = {'eps_low': 1.0, 'eps_high': 1.0}
  selected = part(selections.random_covariance, share=0.002, low=1.0, high=5.0, **bounds)
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, **bounds),
      aggregation=part(aggregation.token_mean),
      weights={'unselected': part(trust_region_masks.unselected)},
      selections={'selected': selected},
    ),
    minibatches=2,
  )
