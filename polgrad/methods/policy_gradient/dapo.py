from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def dapo(*, max_new_tokens: int) -> Method:
  """DAPO (arXiv:2503.14476): clip-higher, token mean, dynamic sampling, soft overlong punishment.

  loss = -token mean of min(r A, clip(r, 0.8, 1.28) A), A group-normalised; no KL. Groups whose
  rewards are all equal are replaced by fresh prompts, at most `max_resamples` times a step; what is
  then still uninformative stays, with zero advantage; the paper resamples without bound.
  Confidence: CODE (formula as in verl's recipe).
  """
  return Method(
    collect=partial(collect.Rollouts, max_resamples=2),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
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
