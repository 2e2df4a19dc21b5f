from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def pass_at_k(
  *,
  samples_per_prompt: int = 8,
  k: int = 2,
  least: float = 1.0,
  eps_low: float = 0.2,
  eps_high: float = 0.28,
) -> Method:
  """Pass@k training (arXiv:2508.10751): the reward of k answers is that of the best, solved exactly.

      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
      A = (1 - rho) / sigma of right answers, (1 - rho - q) / sigma of wrong ones

  r = pi / pi_old. Of n answers to a prompt, c are right. rho is the chance that k of them, drawn
  without replacement, have a right one, sigma = sqrt(rho (1 - rho)), and q the chance that k - 1 of the
  other answers than a given wrong one are all wrong. Compared with group normalisation, hard prompts
  count more, and a prompt with fewer than k wrong answers teaches nothing. So a group must be larger
  than k.

  Args:
    samples_per_prompt: n; the run fills it in.
    k: number of answers of which one should be right; 1 is group normalisation.
    least: least reward of a right answer.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: CODE (advantage), MEMORY (loss and bounds, those of `dapo`); the default of k, for groups
  of eight, is ours.
  """
  if k >= samples_per_prompt:
    raise ValueError(
      f'pass_at_k: k={k} needs more answers to a prompt than {samples_per_prompt}: the best of all of '
      'them is the same for each, so every advantage would be 0'
    )
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.pass_at_k, k=k, least=least)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
