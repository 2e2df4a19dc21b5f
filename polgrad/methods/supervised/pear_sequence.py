from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, weights
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def pear_sequence() -> Method:
  """PEAR per sequence (arXiv:2602.01058): a teacher's right answers, weighted by their likelihood ratio.

      loss = -token mean of sg(w) log pi,   w = clip(prod_t rho_t, 0.1, 10)

  rho = pi / teacher of a token, its logarithm clipped to [-0.08, 0.3]. All tokens of an answer have the
  same weight, and only answers of reward above 1/2 are used. Without the bounds this is importance
  weighting: the gradient of the policy's own success.

  Differences: The answers are sampled from the teacher in the run, while the paper has a data set and
  the stored log-probs of the policy that wrote it.

  Confidence: CODE (weights and bounds, not the authors'), PAPER.
  """
  return Method(
    collect=partial(
      collect.Rollouts, samples_per_prompt=1, behavior_policy=part(behavior_policies.teacher)
    ),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      weights={'row': part(weights.row_importance)},
      only='rewards',
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
