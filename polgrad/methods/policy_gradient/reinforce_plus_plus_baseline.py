from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def reinforce_plus_plus_baseline() -> Method:
  """REINFORCE++-baseline (arXiv:2501.03262): group mean, then whitening over the batch.

  A_i = whiten(R_i - mean_g) over the tokens of the batch; loss = -token mean of min(r A, clip(r,
  0.8, 1.2) A) + 0.01 * k2. One scale for all prompts, where GRPO divides each group by its own
  deviation. k2 as a loss has the gradient of the token-level KL(pi, reference).
  Confidence: CODE (formula), MEMORY (coefficient of k2).
  """
  return Method(
    credit=part(
      credit.outcome,
      advantage=part(advantages.group_mean),
      normalizer=part(advantages.whiten, eps=1e-8),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(0.01, part(penalties.k2))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
