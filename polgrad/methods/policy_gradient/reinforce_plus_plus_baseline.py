from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def reinforce_plus_plus_baseline(*, eps: float = 0.2, kl_coefficient: float = 0.01) -> Method:
  """REINFORCE++-baseline (arXiv:2501.03262): group mean as baseline, then whitening over the batch.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient k2

  r = pi / pi_old, A = whiten(R - group mean) over the tokens of the batch, and
  k2 = (log pi - log reference)^2 / 2. All prompts have the same scale, whereas GRPO divides each
  group by its own standard deviation. k2 as a loss has the gradient of the KL(pi || reference) of
  the token.

  Args:
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of k2.

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
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={'kl': weighted(kl_coefficient, part(penalties.k2))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
