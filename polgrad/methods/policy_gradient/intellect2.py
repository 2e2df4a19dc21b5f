from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def intellect2(
  *,
  eps: float = 0.2,
  cap: float = 4.0,
  kl_coefficient: float = 0.001,
  entropy_coefficient: float = 0.0001,
) -> Method:
  """INTELLECT-2 (arXiv:2505.07291): asynchronous GRPO with two-sided clipping.

      loss = token mean of -min(min(r, cap) A, clip(r, 1 - eps, 1 + eps) A)
             + kl_coefficient k3 - entropy_coefficient H

  r = pi / pi_old, with pi_old the policy that sampled, A is the group-normalised reward, k3 the
  penalty of `grpo`, and H the entropy of the next token. The cap acts only on bad tokens, where PPO
  has no bound. It is the cap of dual-clip PPO, and delta in the paper.

  Differences: Rollouts are two batches old (lag=2), as in the run of the paper.

  Args:
    eps: distance of the clipping bounds from 1.
    cap: largest ratio itself where A < 0, above 1.
    kl_coefficient: of the KL to the reference.
    entropy_coefficient: of the entropy, in nats.

  Confidence: CODE (formula), MEMORY (coefficients).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=2),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=eps, eps_high=eps, cap=cap),
      aggregation=part(aggregation.token_mean),
      penalties={
        'kl': weighted(kl_coefficient, part(penalties.k3)),
        'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy)),
      },
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
