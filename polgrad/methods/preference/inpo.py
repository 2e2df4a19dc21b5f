from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def inpo(
  *, steps: int, eta: float = 7.5e-3, tau: float = 2.5e-3, iterations: AtLeastOne = 3
) -> Method:
  """INPO (arXiv:2407.00617): mirror descent towards the Nash equilibrium, as a loss on pairs.

      loss = mean over pairs of (h - 1 / (2 eta))^2
      h = s(winner) - s(loser),   s = log pi - (tau / eta) log reference - (1 - tau / eta) log pi_k

  pi_k, the anchor `previous`, is the policy at the start of iteration k. It samples 8 answers a prompt,
  and winner and loser are those of a knock-out tournament; a pair whose winner does not beat its loser
  is left out. Over all pairs of samples of pi_k the minimiser is
  pi_k^(1 - tau / eta) reference^(tau / eta) exp(P(y beats pi_k) / eta) / Z. The phase's `comparison`
  gives P and says who wins.

  Differences: Every pair of the group is compared, where the tournament needs 11 comparisons of 28.

  Args:
    steps: batches of the run; the run fills it in.
    eta: inverse step of mirror descent, in units of the probability.
    tau: coefficient of the KL to the reference; equal to `eta` it is IPO against the reference.
    iterations: number of times that pi_k is taken, evenly over the run.

  Confidence: PAPER, CODE (loss as in COMAL), MEMORY (constants).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=8,
      compare=('wins',),
      choose=part(collect.picks.tournament),
      behavior_policy=part(behavior_policies.previous),
    ),
    credit=part(credit.compared, label='better'),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.two_references, reference_weight=tau / eta),
      link=part(preference_losses.squared, target=1 / (2 * eta)),
    ),
    anchors={
      'reference': part(optim.fixed),
      'previous': part(optim.sync, every=max(steps // iterations, 1)),
    },
  )
