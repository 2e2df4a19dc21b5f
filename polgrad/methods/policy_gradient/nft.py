from polgrad import credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def nft(*, max_new_tokens: int, standardized: bool = False, negative_weight: float = 1.0) -> Method:
  """NFT (arXiv:2505.18116): likelihood of right answers, and of wrong ones under an implied policy.

      loss of a right row = -c log r
      loss of a wrong row = -c log max((1 - q r) / (1 - q), 1)

  per token, with r = pi / pi_old, q the fraction of right rows in the group and c = 1 - q. Rewards
  are 1 for right and 0 for wrong answers. The maximum acts on the value alone, and its gradient is
  passed straight through. q is kept in [0.02, 0.98]. Losses are summed over tokens and divided by a
  constant. By default the first minibatch has the gradient of Dr. GRPO.

  Differences: The constant divisor is 1000 in the paper and `max_new_tokens` here.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    standardized: whether c is sqrt((1 - q) / q), as in GRPO, instead of 1 - q.
    negative_weight: multiplies the loss of wrong rows.

  Confidence: CODE.
  """
  return Method(
    credit=part(
      credit.success_contrast,
      standardized=standardized,
      negative_weight=negative_weight,
      least=0.02,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.negative_aware),
      aggregation=part(aggregation.constant_length, length=max_new_tokens),
    ),
    minibatches=4,
  )
