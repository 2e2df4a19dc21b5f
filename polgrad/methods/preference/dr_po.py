from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.collect import beginnings
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def dr_po(
  *,
  resets: float = 1.0,
  eps: float = 0.2,
  trace: float = 0.95,
  kl_coefficient: float = 0.05,
  value_coefficient: float = 0.1,
  unfinished: float = -1.0,
) -> Method:
  """DR-PO (arXiv:2404.08495): PPO that starts from states of given answers.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A) + value_coefficient (value error)

  With probability `resets` an answer begins with the first tokens of the record's answer, a uniformly
  drawn number of them. They are given, not trained; the reward is that of the whole answer. So the
  policy practises the end of answers whose beginning it would rarely find. r = pi / pi_old, and A is
  GAE of the reward less a KL penalty in every token, whitened over the batch. The reward of an answer
  without a stop token is `unfinished`.

  Differences: The code also fits values and KL on the given tokens, scales rewards and lowers the
  learning rate. It samples at temperature 0.7.

  Args:
    resets: probability to begin with the given answer; 0 is PPO.
    eps: distance of the clipping bounds from 1, and of those of the value from V_old.
    trace: lambda of GAE.
    kl_coefficient: of log pi - log reference in the reward of a token.
    value_coefficient: of the value error.
    unfinished: reward of an answer without a stop token.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      beginning=part(beginnings.uniform, probability=resets),
      unfinished_reward=unfinished,
    ),
    credit=part(
      credit.generalized,
      trace=trace,
      normalizer=part(advantages.whiten),
      kl_coefficient=kl_coefficient,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps))
      },
    ),
    anchors={'reference': part(optim.fixed)},
    epochs=4,
  )
