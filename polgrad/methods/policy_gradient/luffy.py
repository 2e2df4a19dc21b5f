from functools import partial
from typing import Literal

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method, choice
from polgrad.registry import Positive, part, weighted


@choice('shape', {'ratio': ('gamma',), 'power': ('exponent',), 'likelihood': ()})
def luffy(
  *,
  max_new_tokens: int,
  shape: Literal['ratio', 'power', 'likelihood'] = 'ratio',
  gamma: float = 0.1,
  exponent: Positive = 0.5,
  statistics: Literal['all', 'samples'] = 'all',
  entropy_coefficient: float = 0.001,
) -> Method:
  """LUFFY (arXiv:2504.14945): a demonstration in every group, learned from by a shaped probability.

      samples:        loss = -(sum over tokens of r A) / (rows max_new_tokens)
      demonstrations: loss = -(sum over tokens of A p / (p + gamma)) / (rows max_new_tokens)

  r = pi / pi_old, and p = pi(token). A is the reward minus the group mean, over the samples and the
  demonstration together. The gradient of log pi at a token of a demonstration has the weight
  gamma p / (p + gamma)^2, which is largest at p = gamma: at tokens that the policy finds unlikely,
  but not nearly impossible. The loss is the sum of both parts, minus entropy_coefficient times the
  entropy of the next token. The constant is the same in all parts, so that a token has the same
  weight in both.

  The authors' code has other shapes: `power` is p^exponent in the place of p / (p + gamma), which is
  unshaped with exponent 1, and `likelihood` is log p, advantage-weighted supervised learning. Its
  `grpo_split` is statistics='samples': the group mean is over the samples alone, also for the
  demonstration, so where all samples fail they get A = 0 and not less.

  Differences: There is one demonstration per prompt, beside the samples. The formulas are those of
  the authors' runs, apart from the divisors: there the sum over the tokens of all rows is divided
  by 8192, and the entropy is a mean over the tokens of all rows. A common factor does not change
  the steps of Adam, so only the weight of the entropy relative to the rest differs. The equations of
  the paper divide A by the standard deviation, `group_normalized`, and clip the samples: surrogate
  `clipped`.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    shape: what of the probability is learned.
    gamma: probability at which a token of a demonstration is learned most, of `ratio`; the code also
      has 0.3 and 0.5.
    exponent: of `power`.
    statistics: rows of the group mean, 'all' or the 'samples'.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE.
  """
  shared = {
    'aggregation': part(aggregation.constant_length, length=max_new_tokens),
    'penalties': {'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy))},
  }
  shapes = {
    'ratio': part(surrogates.probability_shaped, gamma=gamma),
    'power': part(surrogates.probability_power, exponent=exponent),
    'likelihood': part(surrogates.reinforce),
  }
  demonstration = part(objectives.PolicyGradient, surrogate=shapes[shape], **shared)
  sampled = part(
    objectives.PolicyGradient, surrogate=part(surrogates.importance_weighted), **shared
  )
  outcome = part(credit.outcome, advantage=part(advantages.group_mean))
  # With one demonstration, the mean of the other rows of its group is that of the samples.
  of_others = part(credit.outcome, advantage=part(advantages.leave_one_out))
  split = part(
    credit.by_stream, demonstration=of_others, sampled=part(credit.of_samples, credit=outcome)
  )
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1),
    credit={'all': outcome, 'samples': split}[statistics],
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, demonstration), 'sampled': weighted(1.0, sampled)},
    ),
    minibatches=2,
  )
