from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def empg(
  *, eps: float = 0.2, decay: float = 1.0, next_decay: float = 1.0, bonus: float = 0.05
) -> Method:
  """EMPG (arXiv:2509.09265): turns that the policy is sure of are pushed further.

      loss = -token mean of min(r A_k, clip(r, 1 - eps, 1 + eps) A_k)
      A_k = A g(H_k) + bonus exp(-next_decay H_{k+1}) - mean of these over the turns of the batch
      g(H) = exp(-decay H) / its mean over the turns

  r = pi / pi_old, and A is the group-normalised reward of the row. H_k is the mean entropy of the tokens
  of turn k, scaled to [0, 1] by the least and the largest of the batch. The last turn has no bonus.

  Differences: The least and the largest entropy, and the means, are those of the batch; the paper leaves
  open whether they are those of a prompt. H is taken when the batch is used, before its first update.

  Args:
    eps: distance of the clipping bounds from 1.
    decay: k in the paper; 0 gives all turns the same factor.
    next_decay: k' in the paper.
    bonus: zeta in the paper.

  Confidence: PAPER, CODE (third party).
  """
  return Method(
    collect=partial(collect.Rollouts, stats={'old_entropy': part(logit_stats.entropy)}),
    credit=part(
      credit.entropy_modulated,
      advantage=part(advantages.group_normalized),
      decay=decay,
      next_decay=next_decay,
      bonus=bonus,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
