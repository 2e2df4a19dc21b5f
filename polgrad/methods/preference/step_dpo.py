from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def step_dpo(*, beta: float = 0.5) -> Method:
  """Step-DPO (arXiv:2406.18629): DPO on one step of a derivation, after the steps that are right.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(corrected step) - log(pi / reference)(wrong step)

  Only the tokens of the step, and the stop token after it, count. This is DPO on records of a special
  form: beside the question (`prompt` or `messages`) they have `previous_steps`, the text of all steps
  before the first wrong one, which follows the prompt word for word and is not trained. `chosen` is the
  corrected step and `rejected` the wrong one.

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
