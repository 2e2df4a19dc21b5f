from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import pair_scores, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def ld_dpo(*, beta: float = 0.1, damping: float = 0.5) -> Method:
  """LD-DPO (arXiv:2409.06411): DPO in which the tokens beyond the shared length count less.

      loss = mean over pairs of softplus(-beta (s_w - s_l))
      s = sum_{t <= m} D_t + damping sum_{t > m} D_t,  D_t = log(pi / reference) of token t

  m is the number of tokens of the shorter completion of the pair. damping = 1 is DPO, damping = 0 cuts
  both completions to one length.

  Args:
    beta: coefficient of the KL to the reference.
    damping: alpha of the paper, in [0, 1]; 0.5 is a value to start from.

  Confidence: CODE (TRL).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(pair_scores.damped_sum, damping=damping),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
