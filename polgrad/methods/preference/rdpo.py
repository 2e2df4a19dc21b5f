from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pair_offsets, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def rdpo(*, beta: float = 0.1, alpha: float = 0.01) -> Method:
  """R-DPO (arXiv:2403.19159): DPO in which a difference in length explains a part of the preference.

      loss = mean over pairs of softplus(-(beta h + alpha (|w| - |l|)))
      h = log(pi / reference)(chosen) - log(pi / reference)(rejected)

  |w| and |l| are the tokens of the chosen and the rejected completion. It is the optimum of the reward
  less alpha times the length: a longer chosen completion is pushed up less.

  Args:
    beta: coefficient of the KL to the reference.
    alpha: reward that a token costs; 0 is DPO. The paper searches in [0.005, 1].

  Confidence: CODE (formula), MEMORY (range of alpha).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
      offsets={'length': weighted(-alpha, part(pair_offsets.length_difference))},
    ),
    anchors={'reference': part(optim.fixed)},
  )
