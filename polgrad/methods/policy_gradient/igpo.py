from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, selections, surrogates, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def igpo(
  *,
  share: float = 0.2,
  least: float = 0.2,
  largest: float = 0.6,
  shortest: int = 5,
  longest: int = 10,
  replaced: float = 0.5,
  eps: float = 0.2,
) -> Method:
  """IGPO (arXiv:2509.10396): where all answers are wrong, some begin with a part of the given answer.

      loss = -token mean of w min(r A, clip(r, 1 - eps, 1 + eps) A),   A = R - mean_g

  For a prompt whose answers are all wrong further ones are drawn, which begin with the first fraction
  eta of the chunks of the given answer, eta ~ U[least, largest]. Right ones take the places of wrong
  ones.
  w is 1 for tokens that the policy drew, and for the given tokens of highest entropy, a fraction `share`
  of them; other given tokens have w = 0. r = pi / pi_old, for given tokens too. With a fraction rho of
  right answers the expected update of a group is rho (1 - rho) (g_right - g_wrong): nothing without a
  right answer, and most for rho = 1/2.

  Differences: The paper trains diffusion models, which fill in chunks at any place; here a hint is the
  beginning of the answer. The number of rows that are replaced, the lengths of chunks and the clipping
  are ours: the account that we know does not say them. The quantile of the entropy is that of the given
  tokens of the minibatch.

  Args:
    share: fraction of the given tokens that are learned from; 0 imitates no hint, 1 all of it.
    least: least fraction of the chunks that is given.
    largest: largest fraction.
    shortest: tokens of the shortest chunks.
    longest: tokens of the longest chunks.
    replaced: largest fraction of the rows of a group that are replaced.
    eps: distance of the clipping bounds from 1.

  Confidence: PAPER (from a detailed account).
  """
  return Method(
    collect=partial(
      collect.Inpainted,
      least=least,
      most=largest,
      shortest=shortest,
      longest=longest,
      replaced=replaced,
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      selections={'selected': part(selections.uncertain_hints, share=share)},
      weights={'hints': part(weights.selected)},
    ),
    minibatches=2,
  )
