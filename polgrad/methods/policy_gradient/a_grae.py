from polgrad import credit, objectives
from polgrad.losses import aggregation, difficulty, multipliers, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def a_grae(
  *, goal: float = 1.0, least: float = 1.0, eps_low: float = 0.2, eps_high: float = 0.2
) -> Method:
  """A-GRAE (arXiv:2602.05548): advantages whose symmetry in right and wrong, hard and easy is broken.

      A_i = (w / sqrt(p_g) + (1 - w) / sqrt(1 - p_g)) a_i / 2, times min(1, w / goal) where positive
      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  a is the group-normalised reward (ddof 0), p_g the share of right answers of the group, and w that of
  the batch. While w is small, easy prompts count more and right answers are learned less than wrong ones
  are unlearned, which raises the probability of answers that were not sampled. Later hard prompts count
  more.

  Differences: These are the formulas of the paper. The authors' code divides by 1 - sqrt(p_g) instead of
  sqrt(1 - p_g), has the unbiased deviation, and takes w over groups; its script, run literally, is plain
  GRPO. There is no KL.

  Args:
    goal: share of right answers of the batch from which on nothing is damped.
    least: least reward of a right answer.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: CODE (structure), PAPER (formula, second-hand), MEMORY (loss).
  """
  return Method(
    credit=part(
      credit.scaled,
      credit=part(credit.outcome, advantage=part(difficulty.two_sided, least=least)),
      multiplier=part(multipliers.damped_positive, least=least, goal=goal),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
