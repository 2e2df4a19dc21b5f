from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def grpo() -> Method:
  """GRPO (arXiv:2402.03300): group-normalised rewards, clipped ratio, k3 to a reference.

  A_i = (R_i - mean_g) / (std_g + 1e-6), unbiased std; loss = mean over sequences of token means of
  -min(r A, clip(r, 0.8, 1.2) A) + 0.04 * k3. In expectation the k3 loss has the gradient of the
  token-level KL(reference, pi), exactly so at equal lengths; the paper does this.
  Confidence: CODE (formula as in verl and TRL).
  """
  return Method(
    credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.sequence_mean),
      penalties={'kl': weighted(0.04, part(penalties.k3))},
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
