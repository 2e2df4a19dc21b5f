from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, best_of_n, surrogates
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, Fraction, part
from polgrad.sampling import behavior_policies


def bond(*, n: AtLeastOne = 8, backward: Fraction = 0.5) -> Method:
  """BOND (arXiv:2407.14622): the policy becomes the distribution of the best of n samples.

      loss = (1 - b) KL(best || pi) + b KL(pi || best)
           = -(1 - b) mean of log pi(y*) - b (n - 1) mean of A log pi(y) + b mean of K log pi(y)
      A = log F(y) - mean of the other samples,   K_t = sum over s >= t of log(pi / reference)(y_s)

  up to what has no gradient, where y ~ pi, y* is the best of n samples of the reference, and F(y) the
  fraction of these (and of y itself) whose reward is at most that of y.

  Differences: the paper estimates F with more samples of the reference or learns its quantiles.

  Args:
    n: samples of the reference for each prompt.
    backward: b, the weight of the backward divergence; 1 is `vbon`.

  Confidence: PAPER (form, b), MEMORY (n).
  """
  return Method(
    collect=partial(
      collect.Rollouts, opponents=n, opponent_policy=part(behavior_policies.reference)
    ),
    credit=part(
      credit.best_of_n,
      reward=part(best_of_n.log_quantile),
      policy=backward * (n - 1),
      reference=1 - backward,
      kl_coefficient=backward,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    anchors={'reference': part(optim.fixed)},
  )
