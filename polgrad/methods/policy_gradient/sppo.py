from functools import partial
from typing import Literal

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, pointwise
from polgrad.methods.base import Method
from polgrad.registry import part


def sppo(
  *,
  eta: float = 10.0,
  extremes: bool = True,
  with_itself: bool = True,
  by: Literal['rewards', 'wins'] = 'rewards',
) -> Method:
  """SPPO (arXiv:2405.00675): self-play that regresses log-ratios on win rates.

      loss = mean over rows of (log(pi / reference) - eta (P - 1/2))^2

  P is a win probability: the mean of sigmoid(R - R') over the rewards R' of all answers of the
  group, the row itself included. The rows are the best and the worst of each group. The reference
  is the policy that sampled, a copy that is renewed after the four updates of every batch. To first
  order this is the multiplicative weights update.

  Differences: The paper has eta = 1000 (beta = 0.001), groups of 5, rounds of many batches and a
  learned judge, which is by='wins' with the phase's `comparison`. Its formula is extremes=False,
  with_itself=False: every row, compared with the others.

  Args:
    eta: at the optimum the log-ratio is eta / 2 where P = 1.
    extremes: whether only the best and the worst row of a group are trained on.
    with_itself: whether P compares a row also with itself, which counts as one half.
    by: 'rewards' compares by sigmoid(R - R'), 'wins' by the phase's `comparison`.

  Confidence: CODE (formula and the paper's eta).
  """
  return Method(
    collect=partial(collect.Rollouts, compare=('wins',) if by == 'wins' else ()),
    credit=part(credit.win_rate, with_itself=with_itself, extremes=extremes, by=by),
    objective=part(
      objectives.Pointwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(pointwise.squared, target=eta / 2),  # the target of P = 1
    ),
    anchors={'reference': part(optim.sync, every=4)},
    minibatches=4,
  )
