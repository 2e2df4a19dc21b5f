from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, row_scores, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def gfpo(*, keep: int = 4, eps_low: float = 0.2, eps_high: float = 0.2) -> Method:
  """GFPO (arXiv:2508.09726): many answers are sampled, and only the shortest are learned from.

      A_i = (R_i - mean) / (std + 1e-4) over the `keep` shortest answers to the prompt
      loss = -token mean over these answers of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  The other answers are in no statistic, and leave the loss and its denominator. `credit.score` may be
  `row_scores.efficiency` instead, the reward of a token. If all answers are kept this is GRPO.

  Differences: `keep` is the same for all prompts; it follows their difficulty in `gfpo_adaptive`.

  Args:
    keep: number of answers that are kept; groups should be larger. The default is ours.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: CODE (filter and normalisation, as in TRL), MEMORY (keep, loss).
  """
  return Method(
    credit=part(
      credit.filtered,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized, eps=1e-4)),
      score=part(row_scores.brevity),
      keep=keep,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
