from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def red_weight() -> Method:
  """RED-Weight (arXiv:2509.24203): REINFORCE in which good rows weigh exponentially more.

  loss = -token mean of A log pi, A = w (R - sum w R / sum w) inside the group, w = exp((R - group
  mean) / T), T = 1: the paper's derivation, where weighted advantages add up to 0. The released code
  (Trinity-RFT) has A exp(A / T) with the plain mean, which also raises the likelihood of what was
  sampled: `baselines.exponential_times_advantage`. Ours: rollouts are four batches old, and the rate is
  3e-5: nothing bounds a step, and at 1e-4 accuracy fell from 0.43 to 0.18 in 24 batches.
  Confidence: PAPER (weights), CODE (the released variant and T).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(baselines.exponential_group_mean, temperature=1.0)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
    learning_rate=0.3,
  )
