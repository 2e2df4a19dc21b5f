"""Policies with so few sequences that every expectation is a finite sum; used in tests and reports.

module      what it is for
----------  ---------------------------------------------------------------------------------------
enumerable  a tiny policy: log-probabilities of all its sequences, the exact objective and gradient
estimators  exact mean and variance of the gradient that a credit and an objective give
"""

from polgrad.tabular import enumerable, estimators

__all__ = ['enumerable', 'estimators']
