from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def hpt(*, max_new_tokens: int) -> Method:
  """HPT (arXiv:2509.04419): prompts that no sample solves imitate, all others reinforce.

  A prompt with at most 0 solved samples of 8 keeps its demonstration only, loss -log pi(token) with
  weight 1; any other its samples only, loss -A log pi with A = R - mean of the group, a constant in
  place of lengths, no clip, and 0.001 of entropy. Ours: imitation is the mean over the tokens of the
  demonstrations in use, whose number shrinks as the policy learns.

  Confidence: CODE (gate, losses, constants).
  """
  imitate = part(objectives.Supervised, aggregation=part(aggregation.token_mean))
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.reinforce),
    aggregation=part(aggregation.constant_length, length=max_new_tokens),
    penalties={'entropy': weighted(0.001, part(penalties.negative_entropy))},
  )
  outcome = part(credit.outcome, advantage=part(advantages.group_mean))
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1),
    credit=part(credit.gated, credit=outcome, limit=0, threshold=1.0),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, imitate), 'sampled': weighted(1.0, reinforce)},
    ),
  )
