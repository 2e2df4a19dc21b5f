from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def ipo_md(*, tau: float = 1.0, reference_weight: float = 0.125) -> Method:
  """IPO-MD (arXiv:2403.08635): online IPO on two samples of a mixture with the reference.

      loss = mean over pairs of p (h - 1 / (2 tau))^2 + (1 - p) (h + 1 / (2 tau))^2
      h = log(pi / reference)(y) - log(pi / reference)(y'),   p = P(y beats y')
      y, y' ~ the normalised policy^(1 - w) reference^w, token by token

  It has the stationary points of Nash-MD-PG with the same w, and its samples stay nearer to the
  reference. The phase's `comparison` gives p.

  Args:
    tau: coefficient of the KL to the reference, in units of the probability.
    reference_weight: w of the reference in the mixture; 0 is online IPO.

  Confidence: PAPER.
  """
  mixture = part(behavior_policies.geometric_mixture, reference_weight=reference_weight)
  return Method(
    collect=partial(
      collect.Rollouts, samples_per_prompt=2, compare=('wins',), behavior_policy=mixture
    ),
    credit=part(credit.compared),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.squared, target=1 / (2 * tau)),
    ),
    anchors={'reference': part(optim.fixed)},
  )
