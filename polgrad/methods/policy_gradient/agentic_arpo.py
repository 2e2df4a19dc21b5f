from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def agentic_arpo(
  *,
  started: float = 0.5,
  entropy_weight: float = 0.2,
  threshold: float = 0.5,
  window: int = 20,
  eps: float = 0.2,
) -> Method:
  """Agentic ARPO (arXiv:2507.19849): GRPO on episodes that branch behind replies of tools.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
      A_i = (R_i - mean_g) / (std_g + 1e-6)
      a row is copied behind a reply if clip(u - entropy_weight (H - H_0), 0, 1) <= threshold

  r = pi / pi_old. A fraction `started` of the rows of a prompt start at it. The others become copies of
  rows up to a reply of the environment; those that are not used for a copy start at the prompt too. u is
  uniform in [0, 1); H is the entropy of the first tokens behind the reply, divided by the logarithm of
  the vocabulary, and H_0 that of the first turn. There is no KL. On a task without an environment
  nothing is copied, and the method is GRPO. It has nothing to do with the preference method `arpo`.

  Differences: H is a mean over the drawn tokens, of -log pi. The code has a sum over them, of -p log p
  of their ten likeliest alternatives, so its H may be up to `window` times as large. Rows are drawn to
  their end before they are copied, turn by turn; the code copies them while others run. The number of
  rows is that of the task (16, of which 8 start, in the code). A batch is used for one epoch of two
  updates.

  Args:
    started: fraction of the rows of a prompt that start at it.
    entropy_weight: how much a rise of the entropy changes the probability of a copy.
    threshold: probability of a copy where the entropy does not change.
    window: tokens behind a reply that the entropy is estimated from.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (sampling); MEMORY (aggregation).
  """
  return Method(
    collect=partial(
      collect.Branched,
      started=started,
      entropy_weight=entropy_weight,
      threshold=threshold,
      window=window,
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
