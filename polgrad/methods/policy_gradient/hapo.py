from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, baselines, logit_stats, selections, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers
from polgrad.sampling import processors


def hapo(
  *,
  max_new_tokens: int,
  eps: float = 0.2,
  widening: float = 1.0,
  emphasis: float = 1.0,
  share: float = 0.8,
  max_resamples: int = 2,
  heating: float = 0.05,
) -> Method:
  """HAPO (arXiv:2509.16591): DAPO whose temperature, bounds and advantages follow each token's entropy.

      loss = -token mean of min(r A', clip(r, low, high) A'), at most -10 A' where A' < 0
      low = 1 - eps (1 - widening min(h, 0)),   high = 1 + eps (1 + widening max(h, 0))
      A' = (1 + emphasis h) A for tokens of high entropy that have moved and of low entropy that have not

  r = pi / pi_old. h in [-1, 1] says how far the logarithm of the token's entropy lies above or below its
  `share` quantile over the minibatch. A token has moved if r has passed half of a bound. A is the
  reward, normalised by its mean and deviation over the tokens of the prompt's rows. Groups whose answers
  are all equally right are replaced, and long answers are punished, as in DAPO.

  Tokens are drawn at the temperature T (1 + heating h), with the scale of h from the batch before;
  pi_old is the policy at T. The first batch is drawn at T.

  Differences: h has the sign that the paper intends; in the released code
  tokens of low entropy get |h| (`released_sign` of `selections.signed_entropy`). The statistics of h are
  those of the minibatch, in the code those of a micro-batch.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    eps: distance of the clipping bounds from 1 at h = 0.
    widening: alpha in the paper.
    emphasis: beta in the paper, at most 1.
    share: fraction of the tokens whose entropy counts as low.
    max_resamples: how many times the equally right groups of a batch are replaced.
    heating: tau in the paper, the largest relative change of the temperature, below 1.

  Confidence: CODE.
  """
  overlong = part(
    verifiers.soft_overlong, max_length=max_new_tokens, cache=max(max_new_tokens // 5, 1)
  )
  return Method(
    collect=partial(
      collect.Rollouts,
      max_resamples=max_resamples,
      token_temperature=part(processors.entropy_scaled, strength=heating),
      low_entropy=share,
      recompute_proximal=True,
      stats={'old_entropy': part(logit_stats.entropy)},
    ),
    credit=part(credit.outcome, advantage=part(baselines.token_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(
        surrogates.entropy_adaptive, eps=eps, widening=widening, emphasis=emphasis, cap=10.0
      ),
      aggregation=part(aggregation.token_mean),
      selections={'signed_entropy': part(selections.signed_entropy, share=share)},
    ),
    rewards={'overlong': weighted(1.0, overlong)},
    minibatches=2,
  )
