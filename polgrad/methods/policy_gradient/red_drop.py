from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def red_drop() -> Method:
  """RED-Drop (arXiv:2509.24203): REINFORCE on as many bad rows as there are good ones.

  loss = -token mean of A log pi. In each group rows with R >= group mean stay, of the others equally
  many, chosen at random; A = R - mean of the rows that stayed, and 0 for the rest, which still count
  in the denominator. No ratio is read. Ours: rollouts are four batches old, and the rate is 3e-5:
  nothing bounds a step, and at 1e-4 accuracy fell from 0.43 to 0.29 in 24 batches.
  Confidence: CODE (selection), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(credit.outcome, advantage=part(baselines.balanced_group_mean, standardized=False)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
    learning_rate=0.3,
  )
