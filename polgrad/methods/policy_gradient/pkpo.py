from polgrad import credit, objectives
from polgrad.losses import aggregation, difficulty, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def pkpo(*, samples_per_prompt: int = 8, k: int = 2) -> Method:
  """PKPO (arXiv:2505.15201): unbiased policy gradient of the best of k answers, for any rewards.

      loss = -mean over sequences of A_i log pi(y_i)
      A_i = n / C(n, k) sum over S of (max of S - max of S without i)

  n is the number of answers of the group, and S are all its subsets of k answers that contain answer i.
  The expected gradient is that of the mean over prompts of E[max of k rewards], so neither a baseline
  nor a scale belongs to it. For k > 1 advantages are never negative: an answer is credited for what
  the others do not reach.

  Args:
    samples_per_prompt: n; the run fills it in.
    k: number of answers of which the best counts, at most as many as a group has; 1 is RLOO. The
      default is ours.

  Confidence: CODE (estimator, from the paper's listing), MEMORY (loss).
  """
  if k > samples_per_prompt:
    raise ValueError(
      f'pkpo: k={k} answers, but a prompt has {samples_per_prompt}, so every advantage would be 0'
    )
  return Method(
    credit=part(credit.outcome, advantage=part(difficulty.max_at_k, k=k)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
  )
