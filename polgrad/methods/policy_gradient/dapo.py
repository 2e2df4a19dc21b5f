from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def dapo(
  *, max_new_tokens: int, eps_low: float = 0.2, eps_high: float = 0.28, max_resamples: int = 2
) -> Method:
  """DAPO (arXiv:2503.14476): clip-higher, token mean, dynamic sampling, soft overlong punishment.

      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  r = pi / pi_old, and A is the group-normalised reward. There is no KL. Groups whose answers are
  all equally correct are replaced by groups of fresh prompts. The reward has a punishment of long
  answers, which falls linearly from 0 to -1 over the last fifth of `max_new_tokens`; it is not
  compared, so a group that is right throughout is replaced even if its lengths differ.

  Differences: Groups are replaced at most `max_resamples` times per batch; the paper has no such
  bound. Groups that are still equally correct stay in the batch.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.
    max_resamples: how many times the equally correct groups of a batch are replaced.

  Confidence: CODE (formula as in verl's recipe).
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=max_resamples),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    rewards={
      'overlong': weighted(
        1.0,
        part(verifiers.soft_overlong, max_length=max_new_tokens, cache=max(max_new_tokens // 5, 1)),
      ),
    },
    minibatches=2,
  )
