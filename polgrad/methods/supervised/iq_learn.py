from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats, penalties
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def iq_learn(*, coefficient: float = 0.1, discount: float = 1.0) -> Method:
  """IQ-Learn for language (arXiv:2409.01369): supervised learning whose logits are consistent Q values.

      loss = token mean of -log pi + coefficient delta^2
      delta_t = v_t + log pi_t - discount v_{t+1},   v = logsumexp(logits)

  v_t + log pi_t is the logit of the token, and v is 0 behind the last token, also of an answer that was
  cut. delta is the reward of the token that the logits imply; with discount 1 the deltas of an answer
  add up to v_1 + log pi(answer). Coefficient 0 is `sft`. With discount 0 the second part is the squared
  logit of the token. The likelihood does not change if all logits of a token are shifted by a constant,
  and delta does.

  This is the form of the paper that learns from demonstrations alone; `iq_learn_online` adds own samples
  to the second part.

  Args:
    coefficient: of the squared implied reward, 0.1 in third-party code; the paper tunes it.
    discount: of the next value.

  Confidence: PAPER.
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      penalties={
        'implied_reward': weighted(coefficient, part(penalties.inverse_soft_q, discount=discount))
      },
      stats={'log_normalizer': part(logit_stats.log_normalizer)},
    ),
    warm_start=False,
  )
