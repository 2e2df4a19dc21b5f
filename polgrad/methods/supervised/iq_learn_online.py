from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats, penalties
from polgrad.methods.base import Method
from polgrad.registry import Fraction, part, weighted


def iq_learn_online(
  *, coefficient: float = 0.1, discount: float = 1.0, sampled_weight: Fraction = 0.1
) -> Method:
  """IQ-Learn with own samples (arXiv:2409.01369): `iq_learn`, whose Q values also fit what it samples.

      loss = token mean over the answers of -log pi
             + coefficient [(1 - w) token mean over the answers of delta^2
                            + w token mean over own samples of delta^2]
      delta_t = v_t + log pi_t - discount v_{t+1},   v = logsumexp(logits)

  w = `sampled_weight`. Own samples are not imitated; only their implied rewards are drawn to 0. w = 0 is
  `iq_learn`.

  Differences: Each prompt has one own sample and its answer, and w is a weight, while the paper mixes
  about 10% own samples into the batch.

  Args:
    coefficient: of the squared implied reward, 0.1 in third-party code; the paper tunes it.
    discount: of the next value.
    sampled_weight: w, in [0, 1].

  Confidence: PAPER.
  """
  mean = part(aggregation.token_mean)
  normalizer = {'log_normalizer': part(logit_stats.log_normalizer)}
  implied = part(penalties.inverse_soft_q, discount=discount)
  answers = part(
    objectives.Supervised,
    aggregation=mean,
    penalties={'implied_reward': weighted(coefficient * (1 - sampled_weight), implied)},
    stats=normalizer,
  )
  samples = part(objectives.Supervised, aggregation=mean, loss=implied, stats=normalizer)
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1, demonstrations=1),
    objective=part(
      objectives.WeightedSum,
      streams={
        'demonstration': weighted(1.0, answers),
        'sampled': weighted(coefficient * sampled_weight, samples),
      },
    ),
    learns='imitate',
  )
