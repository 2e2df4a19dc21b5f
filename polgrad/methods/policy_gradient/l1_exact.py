from polgrad import credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def l1_exact(
  *, max_new_tokens: int, alpha: float = 3e-4, target: int = 0, field: str = ''
) -> Method:
  """L1-Exact (arXiv:2503.04697): answers of a length that the prompt asks for.

      R_i = r_i - alpha |n - L_i|
      A_i = (R_i - mean_g) / (std_g + 1e-6)
      loss = -token mean of min(r A, clip(r, 0.8, 1.2) A)

  n is the length that is wanted and L the length of the answer, in tokens. Wrong answers pay, too.

  Differences: In the paper every prompt states its own n; for that, name the field of the records that
  holds it (`field`), and write it into the prompts. Without a field, all prompts have the same n, which
  they do not state.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    alpha: price of a token too many or too few.
    target: n of all prompts; 0 is half of `max_new_tokens`.
    field: name of the records' field with n; '' takes `target`.

  Confidence: CODE (reward), MEMORY (loss).
  """
  wanted = target or max(max_new_tokens // 2, 1)
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.token_mean),
    ),
    rewards={'length': weighted(alpha, part(verifiers.length_gap, field=field, target=wanted))},
    minibatches=2,
  )
