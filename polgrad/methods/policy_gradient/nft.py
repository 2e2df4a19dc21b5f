from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def nft(
  *,
  max_new_tokens: int,
  standardized: bool = False,
  negative_weight: float = 1.0,
  max_resamples: int = 2,
) -> Method:
  """NFT (arXiv:2505.18116): likelihood of right answers, and of wrong ones under an implied policy.

      loss of a right row = -c log r
      loss of a wrong row = -c log max((1 - q r) / (1 - q), 1)

  per token, with r = pi / pi_old, q the fraction of right rows in the group and c = 1 - q. Rewards
  are 1 for right and 0 for wrong answers. The maximum acts on the value alone, and its gradient is
  passed straight through. log r is cut at 10, beyond which the gradient is 0. q is kept in
  [0.02, 0.98]. Groups that are all right or all wrong are replaced by groups of fresh prompts.
  Losses are summed over tokens and divided by a constant. By default the first minibatch has the
  gradient of Dr. GRPO.

  Differences: The code divides the sum over the tokens of all rows by 1000; here it is divided by
  the rows and `max_new_tokens`. This factor does not change the steps of Adam. Groups are replaced
  at most `max_resamples` times per batch (10 in the code), and those that still have no contrast
  have the weight 0.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    standardized: whether c is sqrt((1 - q) / q), as in GRPO, instead of 1 - q.
    negative_weight: multiplies the loss of wrong rows.
    max_resamples: how many times the groups without contrast of a batch are replaced.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=max_resamples),
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
