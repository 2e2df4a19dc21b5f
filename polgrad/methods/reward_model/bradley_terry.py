from functools import partial

from polgrad import collect, objectives
from polgrad.losses import pair_offsets, preference_losses, score_penalties
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def bradley_terry(
  *,
  centering: float = 0.0,
  barrier: float = 0.0,
  margin_field: str = '',
  focal: bool = False,
  label_smoothing: float = 0.0,
) -> Method:
  """Bradley-Terry reward model (arXiv:2203.02155): logistic loss on the difference of two scores.

      loss = mean over pairs of softplus(-(s_w - s_l - m)) + centering (s_w + s_l)^2
      s = scalar head on the state at the last token of prompt + completion, its stop token

  With these scores P(chosen beats rejected) = sigmoid(s_w - s_l). The first term sees differences only,
  so without `centering` the mean of all scores is arbitrary.

  Args:
    centering: coefficient of (s_w + s_l)^2, which keeps the mean of scores at zero; 0.01 is usual.
    barrier: coefficient of the log-barrier that keeps scores within (-5, 5); 0.01 in InternLM's runs.
    margin_field: field of the records with the margin m; '' is m = 0. Llama 2 uses 1, 2/3, 1/3 and 0
      for pairs of which the chosen completion is significantly, clearly, slightly or negligibly better.
    focal: use the focal ranking loss, which counts pairs that the model is sure of less.
    label_smoothing: probability that a label is wrong, in [0, 1/2].

  Differences: TRL reads the score at the last token that is no padding, also where a chat template
  writes more text after the stop token; here it is always the stop token.

  Confidence: CODE (TRL, and InternLM's xtuner for the focal loss and the barrier).
  """
  penalties = {
    'centering': weighted(centering, part(score_penalties.centered)),
    'barrier': weighted(barrier, part(score_penalties.barrier)),
  }
  margins = {'annotated': weighted(1.0, part(pair_offsets.annotated))}
  numbers = {'annotated_margin': margin_field} if margin_field else {}
  return Method(
    collect=partial(collect.Preferences, numbers=numbers),
    objective=part(
      objectives.RewardModel,
      link=part(preference_losses.focal if focal else preference_losses.logistic),
      offsets=margins if margin_field else {},
      penalties={name: one for name, one in penalties.items() if one.weight},
      label_smoothing=label_smoothing,
    ),
    warm_start=False,
  )
