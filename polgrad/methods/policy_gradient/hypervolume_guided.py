from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def hypervolume_guided(*, max_new_tokens: int, capacity: int = 16) -> Method:
  """Hypervolume-guided reward weights (arXiv:2509.11452): new trade-offs between rewards count more.

      R_i = (0.5 + 1.5 tanh(V)) (accuracy_i + brevity_i),   A_i = R_i - mean of its group
      loss = -mean over sequences of A_i log pi(y_i)

  V is the volume that the policy's mean (accuracy, brevity) adds to the volume that its earlier ones
  dominate, measured from (0, -1). The rewards of a step that reaches a new trade-off are up to twice as
  large, those of other steps half as large. The factor is 1 until a first
  trade-off is kept.

  Differences: The paper measures the policy on held-out problems at times; here the means of the batch
  are taken at every step. Its further variant is the method `gradient_guided`. Brevity is the soft
  overlong punishment of DAPO over the whole length, in the place of the paper's conciseness, and the
  format reward is left to the task. A deviation of the group would divide the factor out, and Adam sees
  it only as changes between steps.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    capacity: number of earlier trade-offs that are kept.

  Confidence: CODE (factor), DERIVED (rewards and place of the factor).
  """
  brevity = part(verifiers.soft_overlong, max_length=max_new_tokens, cache=max_new_tokens)
  return Method(
    collect=partial(collect.Rollouts, terms=('brevity',)),
    credit=part(
      credit.hypervolume_guided,
      credit=part(credit.outcome, advantage=part(advantages.group_mean)),
      terms={'brevity': 1.0},
      reference=(0.0, -1.0),
      capacity=capacity,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.sequence_sum),
    ),
    rewards={'brevity': weighted(1.0, brevity)},
  )
