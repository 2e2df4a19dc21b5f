from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pair_offsets, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def odpo(*, beta: float = 0.1, alpha: float = 1.0, log: bool = True) -> Method:
  """ODPO (arXiv:2402.10571): DPO whose pairs must differ by a margin that the data give.

      loss = mean over pairs of softplus(-(beta h - alpha f(m)))
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  m is the number in the field `margin` of a record, at least 0, such as the difference of two
  ratings, and f(m) is log(1 + m) or m.

  Args:
    beta: coefficient of the KL to the reference.
    alpha: multiplies the margin; 0 is DPO.
    log: whether f is the logarithm.

  Confidence: MEMORY.
  """
  return Method(
    collect=partial(
      collect.Preferences,
      numbers={'annotated_margin': 'margin'},
      not_negative=('annotated_margin',),
    ),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      offsets={
        'annotated': weighted(
          alpha, part(pair_offsets.log_annotated if log else pair_offsets.annotated)
        )
      },
    ),
    anchors={'reference': part(optim.fixed)},
  )
