from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def red_weight(*, reward_temperature: float = 1.0) -> Method:
  """RED-Weight (arXiv:2509.24203): REINFORCE in which good rows have exponentially larger weights.

      loss = -token mean of A log pi
      A = w (R - sum w R / sum w) in the group,   w = exp((R - group mean) / reward_temperature)

  This is the derivation of the paper, where the advantages of a group sum to 0.

  Differences: The released code (Trinity-RFT) has A exp(A / T) with the plain group mean, which
  also raises the likelihood of all that was sampled (see `baselines.exponential_times_advantage`).
  Rollouts are four batches old (lag=4). The learning rate is 0.3 times that of the run, because
  nothing bounds a step.

  Args:
    reward_temperature: T, in units of the reward; a large one makes all weights equal.

  Confidence: PAPER (weights), CODE (the released variant and T).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(
      credit.outcome,
      advantage=part(baselines.exponential_group_mean, temperature=reward_temperature),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
    learning_rate=0.3,
  )
