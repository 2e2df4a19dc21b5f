from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def kl_cov(
  *, fraction: float = 0.02, kl_coefficient: float = 1.0, max_resamples: int = 2
) -> Method:
  """KL-Cov (arXiv:2505.22617): the tokens that sharpen the policy most are held at the old policy.

      loss = token mean of -r A + kl_coefficient |log r| 1[token is selected]
      c = (A - mean A) (log pi - mean log pi)

  r = pi / pi_old, and A is the group-normalised reward. The tokens of a minibatch with the largest
  c are selected: `fraction` of all, but at least one. To first order, the covariance c is what
  lowers the entropy. There is no clipping. In the first minibatch of a rollout log r = 0, and the
  penalty has no gradient. Groups whose rewards are all equal are replaced by groups of fresh
  prompts.

  Differences: The fraction is 0.02 instead of 0.002, because minibatches are small. Groups are
  replaced at most `max_resamples` times per batch.

  Args:
    fraction: selected tokens, as a fraction of the tokens of a minibatch.
    kl_coefficient: of the penalty |log r|.
    max_resamples: how many times the groups with equal rewards of a batch are replaced.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=max_resamples),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.top_covariance, share=fraction)},
      penalties={'kl': weighted(kl_coefficient, part(penalties.selected_absolute))},
    ),
    minibatches=4,
  )
