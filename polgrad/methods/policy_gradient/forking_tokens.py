from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def forking_tokens(
  *, share: float = 0.2, eps_low: float = 0.2, eps_high: float = 0.28, max_resamples: int = 2
) -> Method:
  """The 80/20 rule (arXiv:2506.01939): only the tokens of highest entropy are learned from.

      loss = -token mean of 1[H >= tau] min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  r = pi / pi_old, and A is the group-normalised reward. H is the entropy of the next token under the
  policy, and tau its (1 - share) quantile over the tokens of the minibatch. The mean is over all tokens,
  so the gradients of the tokens that are left keep their size. Groups with equal rewards are
  replaced, as in DAPO, on which the paper builds.

  Differences: The quantile is that of the minibatch; that of TRL is taken over its micro-batches. The
  paper keeps DAPO's punishment of long answers, which tasks of polgrad may add as a reward.

  Args:
    share: fraction of the tokens that are learned from.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    max_resamples: how many times the equally rewarded groups of a batch are replaced.

  Confidence: CODE (as in TRL).
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=max_resamples),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.top_entropy, share=share)},
      weights={'forking': part(weights.selected)},
    ),
    minibatches=2,
  )
