from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def gradient_guided(*, max_new_tokens: int, rate: float = 0.1, parameters: str = '') -> Method:
  """Gradient-based reward weights (arXiv:2509.11452): rewards whose gradients agree count more.

      R_i = w_1 accuracy_i + w_2 brevity_i,   A_i = (R_i - mean) / (std + 1e-6) of its group
      log w_k <- log w_k + rate sum_j g_k . g_j,   and then w_1 + w_2 = 1
      loss = -mean over sequences of sums of r A_i

  g_k is the gradient of the loss with the advantages of reward k alone, at the parameters that sampled
  the batch. The weights are changed before the batch is credited; at first both are 1/2. r = pi / pi_old
  is not clipped.

  Differences: Brevity is the soft overlong punishment of DAPO over the whole length, in the place of the
  paper's conciseness, and the format reward is left to the task. The rate does not follow the schedule
  of the learning rate. Gradients of one batch are compared, not averages over several.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    rate: change of log w per unit of the products: learning rate / 1e-5 in the authors' code.
    parameters: regular expression that finds the names of the parameters whose gradients are compared;
      '' is all, where the authors take some.

  Confidence: CODE (weights), DERIVED (rewards, parameters).
  """
  brevity = part(verifiers.soft_overlong, max_length=max_new_tokens, cache=max_new_tokens)
  return Method(
    collect=partial(collect.Rollouts, terms=('brevity',)),
    credit=part(
      credit.gradient_guided,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      terms={'brevity': 1.0},
      rate=rate,
      parameters=parameters,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.importance_weighted),
      aggregation=part(aggregation.sequence_sum),
    ),
    rewards={'brevity': weighted(1.0, brevity)},
  )
