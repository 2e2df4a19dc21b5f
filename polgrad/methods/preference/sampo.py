from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, pair_selections, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def sampo(*, beta: float = 0.1, shared: bool = True) -> Method:
  """SamPO (arXiv:2406.10957): DPO on as many tokens of the longer completion as the shorter one has.

      loss = mean over pairs of softplus(-beta (s_w - s_l))
      s = sum over m tokens of log(pi / reference)

  m is the number of tokens of the shorter completion, all of whose tokens count. Of the longer one m
  tokens are drawn without replacement, anew in every update. Pairs of equal length have the loss of DPO.

  Differences: The authors' code draws the tokens of the reference separately (shared=False), so the sum
  is no sum of log-ratios. One subset for both has less variance.

  Args:
    beta: coefficient of the KL to the reference.
    shared: whether policy and reference are summed over the same tokens.

  Confidence: CODE.
  """
  selections = {'selected': part(pair_selections.shortened)}
  if shared:
    score = implicit_rewards.selected_log_ratio_sum
  else:
    score = implicit_rewards.separately_selected_sum
    selections['reference_selected'] = part(pair_selections.shortened, again=True)
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(score),
      link=part(preference_losses.logistic),
      beta=beta,
      selections=selections,
    ),
    anchors={'reference': part(optim.fixed)},
  )
