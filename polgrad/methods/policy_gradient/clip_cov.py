from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates, trust_region_masks
from polgrad.methods.base import Method
from polgrad.registry import part


def clip_cov(
  *,
  fraction: float = 0.002,
  low: float = 1.0,
  high: float = 5.0,
  eps: float = 1.0,
  max_resamples: int = 2,
) -> Method:
  """Clip-Cov (arXiv:2505.22617): some of the tokens that sharpen the policy most are dropped.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A), but 0 for selected tokens
      c = (A - mean A) (log pi - mean log pi)

  r = pi / pi_old, and A is the group-normalised reward. Tokens with low < c < high that are not
  clipped are candidates. As many of them as `fraction` of the minibatch's tokens, but at least one,
  are selected at random. To first order, the covariance c is what lowers the entropy. Groups whose
  rewards are all equal are replaced by groups of fresh prompts.

  Differences: The fraction is 0.002 instead of 0.0002, because minibatches are small. Groups are
  replaced at most `max_resamples` times per batch.

  Args:
    fraction: selected tokens, as a fraction of the tokens of a minibatch.
    low: lower bound of c for candidates.
    high: upper bound of c for candidates.
    eps: distance of the clipping bounds from 1.
    max_resamples: how many times the groups with equal rewards of a batch are replaced.

  Confidence: CODE.
  """
  bounds = {'eps_low': eps, 'eps_high': eps}
  selected = part(selections.random_covariance, share=fraction, low=low, high=high, **bounds)
  return Method(
    collect=partial(collect.Rollouts, max_resamples=max_resamples),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, **bounds),
      aggregation=part(aggregation.token_mean),
      weights={'unselected': part(trust_region_masks.unselected)},
      selections={'selected': selected},
    ),
    minibatches=2,
  )
