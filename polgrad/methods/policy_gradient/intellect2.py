from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def intellect2() -> Method:
  """INTELLECT-2 (arXiv:2505.07291): asynchronous GRPO with two-sided clipping.

  loss = token mean of -min(min(r, 4) A, clip(r, 0.8, 1.2) A) + 0.001 k3 - 0.0001 entropy. The bound
  delta = 4 acts on bad tokens only, where PPO has none: it is the cap of dual-clip PPO. Rollouts are
  two batches old, as in the run of the paper; the ratio is to the sampler.
  Confidence: CODE (formula), MEMORY (coefficients).
  """
  return Method(
    collect=partial(collect.Rollouts, lag=2),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.dual_clipped, eps_low=0.2, eps_high=0.2, cap=4.0),
      aggregation=part(aggregation.token_mean),
      penalties={
        'kl': weighted(0.001, part(penalties.k3)),
        'entropy': weighted(0.0001, part(penalties.negative_entropy)),
      },
    ),
    anchors={'reference': part(optim.fixed)},
    minibatches=2,
  )
