from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def online_dpo(*, beta: float = 0.1) -> Method:
  """Online DPO (arXiv:2402.04792): the DPO loss on two samples, ranked by their rewards.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(better) - log(pi / reference)(worse)

  The log-ratios are sums over the tokens of an answer. A pair of equal rewards is left out of both
  the sum and the number of pairs.

  Differences: The paper asks a language model which answer is better. Here it is the one with the
  larger reward.

  Args:
    beta: coefficient of the KL to the reference.

  Confidence: CODE (formula as in TRL).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2),
    credit=part(credit.preference),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={'reference': part(optim.fixed)},
  )
