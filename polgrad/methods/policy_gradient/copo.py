from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def copo(
  *,
  answer_pattern: str = '(.*)',
  steepness: float = 5.0,
  middle: float = 1.0,
  local: str = 'rewarded',
  eps: float = 0.2,
) -> Method:
  """COPO (arXiv:2508.04138): prompts whose answers agree are compared with other prompts.

      loss = mean over sequences of token means of w L(A) + (1 - w) L(A')
      L(A) = -min(r A, clip(r, 1 - eps, 1 + eps) A), and at most -3 A where A < 0
      w = sigmoid(steepness (H - middle)), H the entropy of the answers of the group, bits

  A is the group-normalised reward, A' the mean reward of the group, normalised over the prompts of the
  batch. A group that is all right or all wrong has A = 0 and still learns from A'. Where the answers of
  a group differ, H is large and the group compares its own rows. The answer is the last match of
  `answer_pattern`; its class is a term of the reward with weight 0, `answer`.

  Differences: `local` 'rewarded' sets w = 0 for answers with reward 0, as the authors' main script does;
  'informative' does so where A = 0, and 'all' never. The mean reward of a group is not multiplied by its
  consistency, which is off in that script (`credit.consistent`).

  Args:
    answer_pattern: regular expression whose first group is the answer.
    steepness: of w, per bit.
    middle: entropy at which both comparisons count the same, bits.
    local: 'rewarded', 'informative' or 'all', which rows compare with their own group at all.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Rollouts, terms=('answer',)),
    credit=part(credit.two_level, steepness=steepness, middle=middle, local=local),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.two_level_clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
    ),
    rewards={'answer': weighted(0.0, part(verifiers.answer_class, pattern=answer_pattern))},
    minibatches=2,
  )
