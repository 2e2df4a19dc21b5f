from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, multipliers, surrogates
from polgrad.methods.base import Method
from polgrad.registry import NotNegative, part


def iw_opd(*, strength: NotNegative = 0.5, samples_per_prompt: int = 1) -> Method:
  """IW-OPD (arXiv:2606.22600): on-policy distillation in which early tokens of a row count more.

      loss = -token mean of w A log S
      A    = log T - log S_old   at the sampled token
      w_t  = 1 + strength (1 - sum_{j < t} |A_j| / sum_j |A_j|)

  The student S samples, and the teacher T gives the log-probability of each sampled token. The further
  they have parted in the row before a token, the less the teacher's opinion of it counts. w and A carry
  no gradient. With strength 0 this is `sampled_distillation` without bounds, whose expected gradient is
  that of the reverse KL of tokens.

  Args:
    strength: how much more the first token of a row counts.
    samples_per_prompt: completions of each prompt.

  Confidence: CODE (as in TRL).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=samples_per_prompt),
    credit=part(
      credit.scaled,
      credit=part(credit.teacher_log_ratio, clip=float('inf')),
      multiplier=part(multipliers.early, strength=strength),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
