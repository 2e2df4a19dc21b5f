from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def dno(*, steps: int, eta: float = 0.1, iterations: AtLeastOne = 3) -> Method:
  """DNO (arXiv:2404.03715): logistic regression of log-ratios on differences of win rates.

      loss = mean over pairs of p softplus(-eta h) + (1 - p) softplus(eta h)
      h = log(pi / pi_k)(y) - log(pi / pi_k)(y'),   p = sigmoid(r(y) - r(y'))

  r(y) is the mean probability to beat the other answers of the group, an estimate of P(y beats pi_k).
  All answers are used, in pairs by their order. pi_k, the anchor `reference`, samples them; it is the
  policy at the start of iteration k. The minimiser is pi_k exp(r / eta) / Z, the multiplicative weights
  update. The phase's `comparison` gives P.

  Args:
    steps: batches of the run; the run fills it in.
    eta: inverse step of mirror descent; multiplies the log-ratios.
    iterations: number of times that pi_k is taken, evenly over the run.

  Confidence: MEMORY (objective), DERIVED (its minimiser).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=8,
      compare=('wins',),
      behavior_policy=part(behavior_policies.reference),
    ),
    credit=part(credit.win_rate_gap),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=eta,
    ),
    anchors={'reference': part(optim.sync, every=max(steps // iterations, 1))},
  )
