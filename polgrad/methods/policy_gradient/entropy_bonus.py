from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def entropy_bonus(*, eps: float = 0.2, entropy_coefficient: float = 0.001) -> Method:
  """Entropy bonus (arXiv:1602.01783): GRPO's surrogate and a reward for entropy.

      loss = token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) - entropy_coefficient H

  r = pi / pi_old, and A is the group-normalised reward. H is the exact entropy of the next-token
  distribution; its gradient in the logits is -pi (log pi + H). The gradient leaves out that an
  early token changes the entropy of later ones. There is no KL.

  Args:
    eps: distance of the clipping bounds from 1.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE.
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy))},
    ),
    minibatches=2,
  )
