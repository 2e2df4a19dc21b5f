from polgrad import credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def nft(*, max_new_tokens: int) -> Method:
  """NFT (arXiv:2505.18116): right answers raise pi, wrong ones what pi leaves of the old policy.

  With q the group's success rate and c = 1 - q, right rows have the loss -c log r and wrong ones -c
  log max((1 - q r) / (1 - q), 1), r = pi / pi_old per token, the maximum in the value only. q is kept
  in [0.02, 0.98]. Summed and divided by a constant: 1000 in the paper, the 5 tokens of an answer
  here. The first minibatch has the gradient of Dr. GRPO.
  Confidence: CODE.
  """
  return Method(
    credit=part(credit.success_contrast, standardized=False, negative_weight=1.0, least=0.02),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.negative_aware),
      aggregation=part(aggregation.constant_length, length=max_new_tokens),
    ),
    minibatches=4,
  )
