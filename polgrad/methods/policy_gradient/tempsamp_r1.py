from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, reward_maps, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def tempsamp_r1(
  *,
  knee: float = 0.8,
  above: float = 0.01,
  below: float = 1.0,
  eps_low: float = 0.2,
  eps_high: float = 0.28,
) -> Method:
  """TempSamp-R1 (arXiv:2509.18056): the answer in the data is one of the group, under a bent reward.

      R_i = knee + above log(1 + r_i - knee) from the knee on,
            knee - (e^(below (knee - r_i)) - 1) / (e^below - 1) below it
      A_i = (R_i - mean_g) / (std_g + 1e-6)
      loss = -token mean of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)

  One answer of each group is that of the data, with the live policy's probabilities as the old ones. Its
  reward is high, so without the bend nearly all sampled answers would have negative advantages. The bend
  compresses high rewards and enlarges differences between low ones.

  Differences: The answer of the data is added to the samples; the authors replace one of them. The map
  is applied to the whole reward; in the code it is applied to the accuracy alone, the overlap of two
  spans, and 0.1 for the format is added afterwards. The formula is that of a re-implementation. Two
  further ways of the paper to use the answer are not here.

  Args:
    knee: reward at which the map bends.
    above: slope above the knee.
    below: how much the map bends below it.
    eps_low: distance of the lower clipping bound from 1.
    eps_high: distance of the upper clipping bound from 1.

  Confidence: CODE (map, of a re-implementation), MEMORY (the rest).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      demonstrations=1,
      recompute_proximal=True,
    ),
    credit=part(
      credit.shaped,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      reward=part(reward_maps.bent, knee=knee, above=above, below=below),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps_low, eps_high=eps_high),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
