from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def dno_prct(
  *, steps: int, eta: float = 0.1, min_gap: float = 0.0, iterations: AtLeastOne = 3
) -> Method:
  """DNO-Prct (arXiv:2404.03715): DPO on the best and the worst of samples and a given answer.

      loss = mean over pairs of softplus(-eta h)
      h = log(pi / pi_k)(best) - log(pi / pi_k)(worst)

  pi_k, the anchor `reference`, is the policy at the start of iteration k. It samples four answers a
  prompt, to which the record's answer is added. They are ranked by their mean probability to beat the
  others, which the phase's `comparison` gives.

  Differences: The paper samples five answers. A language model scores them, and every pair with a large
  difference of scores is kept; the given answer is mostly the better one of its pairs. Here one pair of
  a prompt is kept, if its win rates differ by at least `min_gap`.

  Args:
    steps: batches of the run; the run fills it in.
    eta: multiplies the log-ratios.
    min_gap: least difference of the win rates of a pair.
    iterations: number of times that pi_k is taken, evenly over the run.

  Confidence: MEMORY (objective, choice of pairs and constants).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=4,
      demonstrations=1,
      compare=('wins',),
      choose=part(collect.picks.best_worst_by_wins, min_gap=min_gap),
      behavior_policy=part(behavior_policies.reference),
    ),
    credit=part(credit.compared, label='better'),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=eta,
    ),
    anchors={'reference': part(optim.sync, every=max(steps // iterations, 1))},
  )
