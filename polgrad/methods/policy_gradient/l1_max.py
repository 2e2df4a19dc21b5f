from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def l1_max(*, max_new_tokens: int, alpha: float = 3e-4, target: int = 0, field: str = '') -> Method:
  """L1-Max (arXiv:2503.04697): answers of at most the length that the prompt asks for.

      R_i = r_i clip(alpha (n - L_i) + 1/2, 0, 1)
      A_i = (R_i - mean_g) / (std_g + 1e-6)
      loss = -token mean of min(r A, clip(r, 0.8, 1.2) A)

  n is the largest length that is wanted and L the length of the answer, in tokens. A wrong answer has
  the reward 0 at any length.

  Differences: This is the formula of the paper; the code has half the slope. In the paper every prompt
  states its own n; for that, name the field of the records that holds it (`field`), and write it into
  the prompts. Without a field, all prompts have the same n, which they do not state.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    alpha: how much of the reward a token more or less changes.
    target: n of all prompts; 0 is half of `max_new_tokens`.
    field: name of the records' field with n; '' takes `target`.

  Confidence: PAPER (reward), CODE (its form), MEMORY (loss).
  """
  budget = part(
    verifiers.length_budget,
    field=field,
    target=target or max(max_new_tokens // 2, 1),
    slope=alpha,
  )
  return Method(
    collect=partial(collect.Rollouts, terms=('budget',)),
    credit=part(
      credit.laddered,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      rungs=('budget',),
      weights=(0.0,),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.token_mean),
    ),
    rewards={'budget': weighted(0.0, budget)},
    minibatches=2,
  )
