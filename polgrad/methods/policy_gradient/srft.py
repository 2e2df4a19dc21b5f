from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import (
  advantages,
  aggregation,
  penalties,
  reward_maps,
  row_choices,
  surrogates,
  weights,
)
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def srft(
  *,
  max_new_tokens: int,
  gamma: float = 0.1,
  imitation: float = 0.5,
  exploration: float = 0.1,
  reinforcement: float = 8.0,
  threshold: float = 1.0,
  entropy_coefficient: float = 0.001,
) -> Method:
  """SRFT (arXiv:2506.19767): a demonstration is imitated and reinforced at once, by its entropy.

      imitation:     token mean over demonstrations of -sg(imitation exp(-H)) log pi
      demonstration: -reinforcement (sum over tokens of A p / (p + gamma)) / (rows max_new_tokens)
      sampled:       -reinforcement (sum over tokens of a log pi) / (rows max_new_tokens)
      a = sg(exploration exp(H)) for right samples, -1 for all others

  The loss is the sum of the three. H is the mean entropy of the row's tokens in nats, p = pi(token), and
  A is the reward minus the group mean, over the samples and the demonstration together. The first two
  losses are of the same rows. The last two add -entropy_coefficient times the entropy of the next token.
  The loss of wrong samples is unbounded below, so a few of them can dominate an update.

  Differences: There is one demonstration per prompt, beside the samples. The formulas are those of a
  re-implementation by other authors, which uses neither the ratio nor the clipping that the paper
  writes. It divides the token sum of the last two losses by 8192, and not by the rows; as in `hpt`,
  they weigh `reinforcement` times the mean over rows beside imitation. Its entropy bonus is a mean
  over the tokens of all rows.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    gamma: probability at which a token of a demonstration is reinforced most.
    imitation: weight of the likelihood of a demonstration without entropy.
    exploration: weight of a right sample without entropy.
    reinforcement: weight of both reinforced parts, as a number of rows.
    threshold: smallest reward of a right sample.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE (of a re-implementation), DERIVED (weight of reinforcement).
  """
  shared = {
    'aggregation': part(aggregation.constant_length, length=max_new_tokens),
    'penalties': {'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy))},
  }
  sure = part(weights.row_entropy, scale=imitation, exponent=-1.0)
  unsure = part(weights.positive_row_entropy, scale=exploration, exponent=1.0)
  mean = part(aggregation.token_mean)
  imitate = part(objectives.Supervised, aggregation=mean, weights={'sure': sure})
  shaped = part(surrogates.probability_shaped, gamma=gamma)
  shaped = part(objectives.PolicyGradient, surrogate=shaped, **shared)
  signed = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.reinforce),
    weights={'unsure': unsure},
    **shared,
  )
  samples = part(
    credit.shaped,
    credit=part(credit.outcome, advantage=part(advantages.raw)),
    reward=part(reward_maps.signed, threshold=threshold),
  )
  union = part(credit.outcome, advantage=part(advantages.group_mean))
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1),
    credit=part(credit.by_stream, demonstration=union, sampled=samples),
    objective=part(
      objectives.WeightedSum,
      streams={
        'imitation': weighted(1.0, imitate),
        'demonstration': weighted(reinforcement, shaped),
        'sampled': weighted(reinforcement, signed),
      },
      rows={'imitation': part(row_choices.of_stream, kind='demonstration')},
    ),
    minibatches=2,
  )
