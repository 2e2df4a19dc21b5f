from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def online_dpo() -> Method:
  """Online DPO (arXiv:2402.04792): two samples a prompt, ranked by their rewards, then the DPO loss.

  The paper asks a language model for the preference; here the verifier says which sum is right. Pairs
  that tie teach nothing and are left out of loss and count. beta = 0.1. Confidence: CODE, formula as in TRL
  (code).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2),
    credit=part(credit.preference),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=0.1,
    ),
    anchors={'reference': part(optim.fixed)},
  )
