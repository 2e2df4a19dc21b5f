from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def pure(
  *,
  eps: float = 0.2,
  step_temperature: float = 0.1,
  outcome: float = 1.0,
  drop_ends: bool = True,
  kl_coefficient: float = 0.001,
) -> Method:
  """PURE (arXiv:2504.15275): process rewards of which the worst one counts.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
      reward of step s = w_s p_s,   w = softmax over the steps of the row of -p / T

  r = pi / pi_old. p_s in [-1, 1] is the score of step s, given to its last token less a baseline: the
  reward per token of the other rows of the group times the tokens of the step. The last token of the row
  also gets `outcome` times (reward minus the mean reward of the other rows), and each token
  -kl_coefficient k1. A is the sum of these from the token on, normalised over the batch.

  The scores come from the function in `Phase.spans`, for example
  `--config.phases.train.spans.name=reward_models.step_model`; by default a completion is one step whose
  score is its reward. Set drop_ends=false for tasks whose steps are single tokens.

  Differences: The mean over tokens is that of the batch. In the authors' code the process rewards are
  those of a fixed model that reads the step separators.

  Args:
    eps: distance of the clipping bounds from 1.
    step_temperature: T, of the weights of steps; small ones approach the minimum, large ones the mean.
    outcome: weight of the reward of the row beside the scores of its steps.
    drop_ends: whether the last tokens of steps and rows get no advantage, as in the authors' code.
    kl_coefficient: of the KL to the reference, in the reward of every token.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, spans=True),
    credit=part(
      credit.process_min,
      temperature=step_temperature,
      baseline='token',
      outcome=outcome,
      drop_ends=drop_ends,
      kl_coefficient=kl_coefficient,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'reference': part(optim.fixed)},
  )
