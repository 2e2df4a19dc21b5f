from polgrad import credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def reinforce_plus_plus() -> Method:
  """REINFORCE++ (arXiv:2501.03262): no groups, advantages whitened over all tokens of the batch.

  A_t = whiten(R - beta sum_{k >= t} k1_k) with k1 = log pi_old - log reference and R on the last
  token; loss = -token mean of min(r A, clip(r, 0.8, 1.2) A). The KL penalty to go has the gradient
  of KL(pi, reference) of whole sequences. beta is ours, to matter in five tokens. Whitening
  counts tokens, so long rows weigh more.
  Confidence: CODE (formula), MEMORY (beta).
  """
  return Method(
    credit=part(
      credit.reward_to_go,
      discount=1.0,
      normalizer=part(advantages.whiten, eps=1e-8),
      kl_coefficient=0.01,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
