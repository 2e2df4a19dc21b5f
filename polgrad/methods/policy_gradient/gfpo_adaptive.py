from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, row_scores, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gfpo_adaptive(
  *,
  easy: int = 4,
  medium: int = 6,
  hard: int = 8,
  hardest: int = 8,
  capacity: int = 512,
  warmup: int = 64,
  eps_low: float = 0.2,
  eps_high: float = 0.2,
) -> Method:
  """GFPO with adaptive difficulty (arXiv:2508.09726): more answers to hard prompts are learned from.

      A_i = (R_i - mean) / (std + 1e-4) over the k shortest answers to the prompt
      loss = -token mean over these answers of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  k follows the quartile of the prompt's mean reward among those of recent prompts: `easy` in the highest
  one, then `medium`, `hard` and, in the lowest one, `hardest`. The other answers are in no statistic of
  the advantage, and leave the loss and its denominator; in the mean reward of the prompt they count.
  With one number for all quartiles this is `gfpo`.

  Differences: Quartiles are exact ones of the last `capacity` prompts, where the paper keeps a summary
  of a stream.

  Args:
    easy: answers that are kept in the quartile of the largest mean rewards; groups should be larger.
    medium: in the next one.
    hard: in the third one.
    hardest: in the quartile of the smallest mean rewards, and in all before `warmup`.
    capacity: number of recent prompts.
    warmup: number of prompts that must have been seen before k differs.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: CODE (filter and normalisation, as in TRL), MEMORY (numbers kept, quartiles, loss).
  """
  return Method(
    credit=part(
      credit.filtered_by_difficulty,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized, eps=1e-4)),
      score=part(row_scores.brevity),
      keeps=(easy, medium, hard, hardest),
      capacity=capacity,
      warmup=warmup,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
