"""Policies with so few sequences that every expectation is a finite sum; used in tests and reports.

module      what it is for
----------  ---------------------------------------------------------------------------------------
enumerable  a tiny policy: log-probabilities of all its sequences, the exact objective and gradient
estimators  exact mean and variance of the gradient that a credit and an objective give
turns       environments of several turns: all episodes, the exact objective, values, gradient
games       matrix games of preferences, their solvers and the distance to an equilibrium
bilevel     the gradient of an outer loss through the solution of an inner problem
cliffs      how far the optimal policy moves when the reward changes a little
interventions  when to ask for help within a budget: planning with a price
hybrid      natural policy gradient with on-policy and offline data, exactly
optimism    an actor that follows the most optimistic critic that the data allow
search      one policy update at decision time; optimistic mirror descent
"""

from polgrad.tabular import (
  bilevel,
  cliffs,
  enumerable,
  estimators,
  games,
  hybrid,
  interventions,
  optimism,
  search,
  turns,
)

__all__ = [
  'bilevel',
  'cliffs',
  'enumerable',
  'estimators',
  'games',
  'hybrid',
  'interventions',
  'optimism',
  'search',
  'turns',
]
