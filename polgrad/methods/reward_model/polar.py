from functools import partial

from polgrad import collect, objectives
from polgrad.losses import preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def polar(*, reference_field: str = 'answer') -> Method:
  """POLAR (arXiv:2507.05197): a reward model that compares a completion with a reference answer.

      loss = mean over pairs of softplus(-(r(x, y_ref, y_w) - r(x, y_ref, y_l)))
      r = scalar head on the state at the last token of x, y_ref, x, y

  For pre-training, y_ref and y_w are two samples of one policy and y_l one of another. The best r is
  then the pointwise mutual information of two samples under the pool of policies: it says whether one
  policy wrote both. For fine-tuning, three completions are ranked and the best of them is y_ref. In
  use, y_ref is a reference answer of the record.

  Args:
    reference_field: field of the records with y_ref.

  Differences: the parts of a row are divided by the stop token that ends every completion, instead of
  a new token `<|reward|>`, so any tokenizer will do. A row that is too long loses its end
  (`overlong=truncate`), not the beginning of its prompts.

  Confidence: CODE (layout and loss), PAPER (data).
  """
  return Method(
    collect=partial(collect.Preferences, before=reference_field),
    objective=part(objectives.RewardModel, link=part(preference_losses.logistic)),
    warm_start=False,
  )
