from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, logit_stats, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def d3s(
  *,
  steps: int,
  eps: float = 0.2,
  rows_first: float = 0.25,
  rows_last: float = 0.5,
  tokens_first: float = 0.25,
  tokens_last: float = 0.5,
) -> Method:
  """D3S (arXiv:2509.22115): GRPO on the rows and tokens that teach most, more and more of them.

      loss = -mean over the kept tokens of min(r A, clip(r, 1 - eps, 1 + eps) A)

  r = pi / pi_old, and A is the group-normalised reward, with the statistics of all rows. Of the batch
  those rows are kept whose A have the largest variance, across prompts, and of their tokens those with
  the largest |A| H, where H is the entropy of the policy that the batch finds. Both fractions grow
  linearly over the run.

  Differences: The paper's fractions are not known to us, these are ours. H is taken when the batch
  is used, before its first update. Whether tokens compete within a row or in the whole batch is open;
  here it is the batch.

  Args:
    steps: number of rollouts; the run fills it in.
    eps: distance of the clipping bounds from 1.
    rows_first: fraction of the rows that are kept at the beginning.
    rows_last: the same at the end of the run.
    tokens_first: fraction of the tokens of these rows that are kept at the beginning.
    tokens_last: the same at the end of the run.

  Confidence: PAPER (second-hand account), MEMORY (base loss).
  """
  return Method(
    collect=partial(collect.Rollouts, stats={'old_entropy': part(logit_stats.entropy)}),
    credit=part(
      credit.down_sampled,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      rows=(rows_first, rows_last),
      tokens=(tokens_first, tokens_last),
      batches=steps,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
  )
