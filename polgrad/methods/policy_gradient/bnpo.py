from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, difficulty, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def bnpo(
  *,
  low: float = 0.0,
  high: float = 1.0,
  terms: tuple = (),
  eps_low: float = 0.2,
  eps_high: float = 0.28,
  cap: float = 10.0,
) -> Method:
  """BNPO (arXiv:2506.02864): advantages are divided by a Beta density that is fitted to the batch.

      A_i = (R_i - p_g) / f(p_g),   p_g the mean reward of the group
      loss = -mean over sequences of sums of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  f is the density of a Beta distribution. Its parameters follow from the mean and variance of p_g over
  the prompts of the batch, so that the variance of the gradient is least if the p_g are Beta
  distributed. Other parameters give the advantages of Dr. GRPO (1 and 1) and, up to a factor, of GRPO
  (3/2 and 3/2). Where A < 0 the loss is at most -cap A.

  With several `terms` of the reward, A is the mean of the advantages that each of them has alone, with
  a density of its group means: the advantage decomposition of the paper. The reward itself is then not
  read.

  Differences: A batch whose prompts all have the same p_g has f = 1, because nothing can be fitted.

  Args:
    low: the least reward, or the least value of every term.
    high: the largest reward, or the largest value of every term.
    terms: names of terms of the reward, which are credited one by one; () credits the reward. It is off
      in the authors' script too.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    cap: largest ratio where A < 0.

  Confidence: CODE.
  """
  whole = part(credit.outcome, advantage=part(difficulty.beta_normalized, low=low, high=high))
  credited = part(credit.decomposed, credit=whole, terms=terms) if terms else whole
  return Method(
    collect=partial(collect.Rollouts, **({'terms': terms} if terms else {})),
    credit=credited,
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=eps_low, eps_high=eps_high, cap=cap),
      aggregation=part(aggregation.sequence_sum),
    ),
    minibatches=2,
  )
