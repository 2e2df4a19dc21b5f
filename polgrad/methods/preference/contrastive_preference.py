from functools import partial

from polgrad import collect, objectives
from polgrad.losses import implicit_rewards, preference_losses, score_shapes
from polgrad.methods.base import Method
from polgrad.registry import part


def contrastive_preference(*, beta: float = 10.0, damping: float = 0.5) -> Method:
  """Contrastive preferences (arXiv:2301.12842): logistic on mean log-probs, with a damped loser.

      loss = mean over pairs of softplus(-beta (l_w - damping l_l))

  l_w and l_l are the mean log-probs per token of the chosen and the rejected completion. There is no
  reference. The paper is called DPPO; `dppo` is another method.

  Differences: the paper has deterministic policies of continuous actions, and the mean distance between
  the policy's and the data's actions in the place of -l. It labels all pairs of a batch of segments with
  a preference model. Its code has a damping of 1.

  Args:
    beta: multiplies the difference; 1 / T of the paper's code, whose T is 0.1.
    damping: lambda in the paper: how much the loser is pushed away; 1 is symmetric.

  Confidence: CODE (form of the loss, beta), DERIVED (log-probs in place of distances), MEMORY (damping).
  """
  return Method(
    collect=partial(collect.Preferences),
    objective=part(
      objectives.Pairwise,
      score=part(implicit_rewards.logp_mean),
      link=part(preference_losses.logistic),
      shape=part(score_shapes.damped, factor=damping),
      beta=beta,
    ),
  )
