from functools import partial
from typing import Literal

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, divergences, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def text2grad(
  *,
  eps: float = 0.2,
  trace: float = 0.95,
  value_coefficient: float = 0.1,
  kl_coefficient: float = 0.05,
  kl_target: float = 6.0,
  kl: Literal['exact', 'sampled'] = 'exact',
) -> Method:
  """Text2Grad (arXiv:2505.22338): PPO on the words that a critique praises and criticises.

      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A) + value_coefficient (value error)
      r_t = score_t - beta sum_v pi(v) log(pi(v) / reference(v))

  The score of a token is 1 in a part that is praised, -1 in one that is criticised, 0 elsewhere. A is
  GAE of these rewards, whitened over the batch; r = pi / pi_old in the loss. beta is adapted to hold the
  KL of a row near `kl_target`. The value error is clipped, as in `ppo`. A batch is used for four epochs
  of two minibatches.

  The scores come from the function in `Phase.spans`; `judge.critique` asks a language model for quotes
  of what is good and bad. Without it a completion is one part with its reward.

  Differences: The scripts leave out a minibatch whose mean ratio is large, and stop the epochs early at
  a large KL. A part in which praise and criticism overlap is criticised, as in their code for programs.

  Args:
    eps: distance of the clipping bounds from 1, and of those of the value from V_old.
    trace: lambda of GAE.
    value_coefficient: of the value error.
    kl_coefficient: beta of the first batch.
    kl_target: KL of a row that is wanted, nats.
    kl: 'exact' is the KL over the vocabulary, and the reference is the anchor `teacher`; 'sampled' is
      (log pi - log reference)(y_t), an option of the scripts.

  Confidence: CODE, MEMORY (kl_target).
  """
  stats = {'stats': {'old_kl': part(divergences.reverse_kl)}} if kl == 'exact' else {}
  reference = 'teacher' if kl == 'exact' else 'reference'
  return Method(
    collect=partial(collect.Rollouts, spans=True, **stats),
    credit=part(
      credit.spans_generalized,
      trace=trace,
      kl_coefficient=kl_coefficient,
      kl_target=kl_target,
      kl=kl,
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
      penalties={
        'value': weighted(value_coefficient, part(penalties.clipped_value_error, eps=eps))
      },
    ),
    anchors={reference: part(optim.fixed)},
    epochs=4,
    minibatches=2,
  )
