from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def step_dpo(*, beta: float = 0.5) -> Method:
  """Step-DPO (arXiv:2406.18629): DPO on one step of a derivation, after the steps that are right.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(corrected step) - log(pi / reference)(wrong step)

  Only the tokens of the step count. This is DPO on records of a special form: `prompt` is a text that
  holds the question and all steps before the first wrong one, written as the chat template writes them;
  `chosen` is the corrected and `rejected` the wrong step. A completion follows a text word for word, so
  no template comes between them, and it ends with the stop token, as in the authors' data.

  Differences: records with `messages` have no place for the steps, because what is trained is a whole
  turn.

  Args:
    beta: coefficient of the KL to the reference; the released runs have 0.5 (7B) and 0.4 (72B).

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
