from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, listwise, pointwise, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def opa_dpo(
  *, beta: float = 0.1, anchor_coefficient: float = 1.0, per_token: bool = False
) -> Method:
  """OPA-DPO (arXiv:2501.09695): DPO with weighted tokens, and an anchor on both completions.

      loss = mean over pairs of softplus(-beta (s_w - s_l)) + anchor_coefficient (a_w + a_l)
      s = sum over tokens of weight * log(pi / reference)
      a_w = mean over chosen rows of softplus(-beta D)
      a_l = mean over rejected rows of softplus(beta D)

  D is the log-ratio without weights. Weights of tokens are `chosen_weights` and `rejected_weights` of
  the records, 1 where there are none: the paper has 2.5, 2, 1.5, 1 for the tokens of a sentence that an
  expert has given 1, 2, 3, 4 points. Policy and reference are a model that has learned the preferred
  completions before, so that these are likely under the reference: that is the paper's point.

  Differences: Text only; the paper has terms that compare with a masked image as well. The authors'
  code takes the logistic function of each position (`per_token`) and averages over padding, too; here
  the average is over positions at which one of the rows has a token. The anchor of the authors' code
  lowers the revised completions, although these are preferred in their pairs, and does not read the
  rejected ones; that looks like a slip.

  Args:
    beta: coefficient of the KL to the reference.
    anchor_coefficient: of the anchor.
    per_token: compare the two completions position by position, for pairs of which one is an edited copy
      of the other.

  Confidence: CODE (weights, constants, `per_token`), DERIVED (whole completions, sign of the anchor).
  """
  score = part(implicit_rewards.weighted_log_ratio_sum)
  if per_token:
    loss = part(listwise.token_pair)
    pairs = part(objectives.Listwise, score=score, loss=loss, beta=beta, rows_per_prompt=2)
  else:
    link = part(preference_losses.logistic)
    pairs = part(objectives.Pairwise, score=score, link=link, beta=beta)
  anchor = part(
    objectives.Pointwise,
    score=part(implicit_rewards.log_ratio_sum),
    loss=part(pointwise.logistic),
    beta=beta,
  )
  # The mean over rows is half the sum of the means over chosen and over rejected rows.
  streams = {
    'preference': weighted(1.0, pairs),
    'anchor': weighted(2.0 * anchor_coefficient, anchor),
  }
  return Method(
    collect=partial(collect.Preferences, token_weights=True),
    objective=part(objectives.WeightedSum, streams=streams),
    anchors={'reference': part(optim.fixed)},
  )
