from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def red_drop(*, standardized: bool = False) -> Method:
  """RED-Drop (arXiv:2509.24203): REINFORCE on a balanced number of good and bad rows.

      loss = -token mean of A log pi,   A = R - mean of the rows that are kept

  All rows with R >= group mean are kept. Of the others at most the same number is kept, chosen at
  random. Dropped rows have A = 0 and still count in the denominator. No ratio is computed.

  Differences: Rollouts are four batches old (lag=4). The learning rate is 0.3 times that of the
  run, because nothing bounds a step.

  Args:
    standardized: whether A is also divided by the standard deviation of the rows that are kept.

  Confidence: CODE (selection), PAPER (derivation).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=4),
    credit=part(
      credit.outcome, advantage=part(baselines.balanced_group_mean, standardized=standardized)
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=4,
    learning_rate=0.3,
  )
