from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def kl_cov() -> Method:
  """KL-Cov (arXiv:2505.22617): the tokens that sharpen the policy most are held at the old policy.

  loss = token mean of -r A + 1.0 |log r| on selected tokens: the share of the minibatch's tokens (at
  least one) with the largest (A - mean A)(log pi - mean log pi), which to first order is what lowers
  the entropy. No clip. On the first minibatch log r = 0 and the penalty has no gradient. Ours: a
  share of 0.02 for 0.002, since minibatches are small.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.top_covariance, share=0.02)},
      penalties={'kl': weighted(1.0, part(penalties.selected_absolute))},
    ),
    minibatches=4,
  )
