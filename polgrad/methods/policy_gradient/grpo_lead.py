from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, multipliers, reward_maps, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def grpo_lead(*, strength: float = 0.05, least: float = 1.0) -> Method:
  """GRPO-LEAD (arXiv:2504.09696): short right answers get more, and hard prompts count more.

      R_i = exp(-strength z_i) if right, -1 if wrong, 0 if wrong and cut
      A_i = v (R_i - mean_g) / (std_g + 1e-6), v = w(p_g) where this is positive, else w(1 - p_g)
      loss = -token mean of min(r A, clip(r, 0.8, 1.2) A)

  z is the length of an answer, standardised over the right answers of its group. p_g is the share of
  right answers, and w(x) = 0.4 + 1.1 / (1 + exp(10 (x - 0.75))).

  Differences: In the authors' code lengths are only compared if the three shortest answers of a group
  have more than 4000 tokens on average; here they always are. The reward of the task is replaced.

  Args:
    strength: of the standardised length.
    least: least reward of a right answer, as the task says.

  Confidence: CODE (rewards, factors), MEMORY (loss).
  """
  normalized = part(credit.outcome, advantage=part(advantages.group_normalized))
  # Among the rewards that `brief_when_right` makes, those of right answers alone are positive.
  weighed = part(
    credit.scaled,
    credit=normalized,
    multiplier=part(multipliers.logistic_hardness, least=1e-6),
  )
  return Method(
    credit=part(
      credit.shaped,
      credit=weighed,
      reward=part(reward_maps.brief_when_right, strength=strength, least=least),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
