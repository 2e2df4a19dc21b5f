from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def rso(*, samples: int = 8, temperature_of_rewards: float = 0.5, gamma: float = 0.05) -> Method:
  """RSO (arXiv:2309.06657): pairs of answers that look like samples of the optimal policy.

      loss = mean over pairs of max(0, 1 - gamma h)
      h = log(pi / reference)(better) - log(pi / reference)(worse)

  The reference samples; an answer is accepted with probability exp((R - R_max) / beta), so accepted ones
  have the distribution reference exp(R / beta) / Z. Two of them are a pair, ranked by their rewards; a
  pair of equal rewards is left out.

  Differences: The paper accepts 8 of 64 answers. Its other loss is the logistic one of DPO, the link
  `logistic`.

  Args:
    samples: candidates of a prompt.
    temperature_of_rewards: beta of the acceptance, in units of the reward; a large one accepts all.
    gamma: multiplies the difference of the log-ratios.

  Confidence: PAPER, MEMORY (numbers of candidates), CODE (gamma as in TRL).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      choose=part(collect.picks.rejection, beta=temperature_of_rewards),
      behavior_policy=part(behavior_policies.reference),
    ),
    credit=part(credit.preference),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.hinge),
      beta=gamma,
    ),
    anchors={'reference': part(optim.fixed)},
  )
