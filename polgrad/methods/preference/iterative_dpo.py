from functools import partial
from typing import Literal

from polgrad import collect, credit, objectives, optim
from polgrad.losses import implicit_rewards, preference_losses
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def iterative_dpo(
  *,
  steps: int,
  beta: float = 0.1,
  reference: Literal['fixed', 'current'] = 'fixed',
  length_penalty: float = 0.0,
  iterations: AtLeastOne = 3,
) -> Method:
  """Iterative DPO (arXiv:2405.07863): DPO on the best and the worst of 8 samples, over a few iterations.

      loss = mean over pairs of softplus(-beta h)
      h = log(pi / reference)(best) - log(pi / reference)(worst)

  The samples are of the policy at the start of an iteration, the anchor `previous`. Best and worst are
  those of the reward. A pair of equal rewards is left out.

  Differences: The text has a fixed reference, the code that of the iteration, reference='current'.

  Args:
    steps: batches of the run; the run fills it in.
    beta: coefficient of the KL to the reference.
    reference: 'fixed' is the policy before the first iteration, 'current' that of the present one.
    length_penalty: reward that a token costs while best and worst are chosen; the label is of the reward
      alone.
    iterations: number of times that the sampling policy is renewed, evenly over the run.

  Confidence: CODE.
  """
  renewed = part(optim.sync, every=max(steps // iterations, 1))
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=8,
      choose=part(collect.picks.best_worst, length_penalty=length_penalty),
      behavior_policy=part(behavior_policies.previous),
    ),
    credit=part(credit.preference),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.log_ratio_sum),
      link=part(preference_losses.logistic),
      beta=beta,
    ),
    anchors={
      'reference': renewed if reference == 'current' else part(optim.fixed),
      'previous': renewed,
    },
  )
