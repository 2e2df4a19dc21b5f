from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def hpt(
  *, max_new_tokens: int, limit: int = 0, threshold: float = 1.0, entropy_coefficient: float = 0.001
) -> Method:
  """HPT (arXiv:2509.04419): prompts that no sample solves imitate, all others reinforce.

      imitation:     loss = -token mean of log pi over the demonstration
      reinforcement: loss = -(sum over tokens of A log pi + entropy_coefficient H)
                            / (rows max_new_tokens)

  A prompt with at most `limit` solved samples keeps only its demonstration, and any other prompt
  only its samples. The loss is the sum of both parts. A is the reward minus the group mean, and H
  the entropy of the next token. There is no clipping.

  Differences: Imitation is averaged over the tokens of the demonstrations in use. Their number
  shrinks as the policy learns.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    limit: largest number of solved samples of a prompt that is imitated.
    threshold: smallest reward of a solved sample.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE (gate, losses, constants).
  """
  imitate = part(objectives.Supervised, aggregation=part(aggregation.token_mean))
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.reinforce),
    aggregation=part(aggregation.constant_length, length=max_new_tokens),
    penalties={'entropy': weighted(entropy_coefficient, part(penalties.negative_entropy))},
  )
  outcome = part(credit.outcome, advantage=part(advantages.group_mean))
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1),
    credit=part(credit.gated, credit=outcome, limit=limit, threshold=threshold),
    objective=part(
      objectives.WeightedSum,
      streams={'demonstration': weighted(1.0, imitate), 'sampled': weighted(1.0, reinforce)},
    ),
  )
