from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def simpletir(*, eps_low: float = 0.2, eps_high: float = 0.28, max_resamples: int = 2) -> Method:
  """SimpleTIR (arXiv:2509.02479): rows with a void turn are not trained on.

      loss = token mean of -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), over rows without void turns
      A = (R - mean_g) / (std_g + 1e-6), over all rows of the group

  r = pi / pi_old. A turn is void if it has neither an action nor an answer. Such turns mostly have
  tokens that are unlikely under the policy, and the gradient of their rows can be very large. The reward
  of a row with a void turn stays in the mean and deviation of its group. Groups that are all right or
  all wrong are replaced by groups of fresh prompts. There is no KL.

  Differences: Groups are replaced at most `max_resamples` times per batch. The environment
  decides which turns are void (`void_turns`).

  Args:
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    max_resamples: how many times the equally correct groups of a batch are replaced.

  Confidence: CODE (filter, bounds), MEMORY (token mean).
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=max_resamples),
    credit=part(
      credit.without_void,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
