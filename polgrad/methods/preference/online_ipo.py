from functools import partial
from typing import Literal

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def online_ipo(*, tau: float = 1.0, label: Literal['soft', 'drawn', 'better'] = 'soft') -> Method:
  """Online IPO (arXiv:2403.08635): the IPO loss on two samples of the policy.

      loss = mean over pairs of p (h - 1 / (2 tau))^2 + (1 - p) (h + 1 / (2 tau))^2
      h = log(pi / reference)(y) - log(pi / reference)(y'),   p = P(y beats y')

  The log-ratios are sums over the tokens of an answer. The expected gradient is -4 / tau times that of
  the self-play objective P(pi beats pi') - tau KL(pi, reference), so the stationary point is the Nash
  equilibrium of the regularised game, also where preferences are not transitive. The phase's
  `comparison` gives p.

  Args:
    tau: coefficient of the KL to the reference, in units of the probability.
    label: 'soft' takes p itself, 'drawn' draws the winner with probability p, which has the same
      expected gradient, and 'better' calls the more probable winner the winner.

  Confidence: PAPER, DERIVED (the factor 4 / tau of this loss; the paper states it with 2 / tau).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=2, compare=('wins',)),
    credit=part(credit.compared, label=label),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.squared, target=1 / (2 * tau)),
    ),
    anchors={'reference': part(optim.fixed)},
  )
