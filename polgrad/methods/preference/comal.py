from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def comal(
  *,
  steps: int,
  eta: float = 2e-3,
  tau: float = 2e-3 / 3,
  second: bool = False,
  iterations: AtLeastOne = 24,
  reference_iterations: int = 12,
) -> Method:
  """COMAL (arXiv:2410.23223): INPO whose reference follows, towards the Nash equilibrium without a KL.

      loss = mean over pairs of (h - 1 / (2 eta))^2
      h = s(winner) - s(loser),   s = log pi - (tau / eta) log reference - (1 - tau / eta) log pi_k

  pi_k, the anchor `previous`, is renewed every iteration, and the reference only after every
  `reference_iterations` of them: a proximal point method. Of 4 answers of pi_k the winner has the
  highest mean probability to beat the others, and the loser the lowest. The phase's `comparison` gives
  these probabilities.

  Differences: The code has 5 answers of a prompt, and takes the second best as the loser, which is
  second=True.

  Args:
    steps: batches of the run; the run fills it in.
    eta: inverse step of mirror descent, in units of the probability.
    tau: coefficient of the KL to the reference.
    second: whether the loser is the second best answer.
    iterations: number of times that pi_k is taken, evenly over the run.
    reference_iterations: number of iterations between two changes of the reference.

  Confidence: CODE (loss, eta, tau and the changes of the reference).
  """
  every = max(steps // iterations, 1)
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=4,
      compare=('wins',),
      choose=part(collect.picks.best_worst_by_wins, second=second),
      behavior_policy=part(behavior_policies.previous),
    ),
    credit=part(credit.compared, label='better'),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.two_references, reference_weight=tau / eta),
      link=part(preference_losses.squared, target=1 / (2 * eta)),
    ),
    anchors={
      'reference': part(optim.sync, every=reference_iterations * every),
      'previous': part(optim.sync, every=every),
    },
  )
