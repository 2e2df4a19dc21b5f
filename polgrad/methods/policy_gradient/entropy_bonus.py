from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def entropy_bonus() -> Method:
  """Entropy bonus (arXiv:1602.01783): GRPO's surrogate and a reward for undecided next tokens.

  loss = token mean of -min(r A, clip(r, 0.8, 1.2) A) - 0.001 H_t, H the exact entropy of the
  next-token distribution with its gradient -pi (log pi + H) in the logits. It does not see that an
  early token changes the entropy of later ones. No KL.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      penalties={'entropy': weighted(0.001, part(penalties.negative_entropy))},
    ),
    minibatches=2,
  )
