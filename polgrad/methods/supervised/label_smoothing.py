from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def label_smoothing(*, smoothing: float = 0.1, normalizer_coefficient: float = 1e-4) -> Method:
  """Label smoothing (arXiv:1512.00567) with z-loss (arXiv:2204.02311): supervised fine-tuning.

      loss = token mean of -(1 - e) log pi(y) - e mean_v log pi_v + normalizer_coefficient Z^2

  e = smoothing, the mean is over the vocabulary, and Z = logsumexp(logits). The first part is the
  cross-entropy with the target (1 - e) one_hot(y) + e / V, so logits do not grow without bound. The
  cross-entropy does not change if all logits are shifted by a constant; the second part keeps Z
  near 0. With smoothing and coefficient 0 this is `sft`.

  Args:
    smoothing: part of the target that is spread over the vocabulary, in [0, 1).
    normalizer_coefficient: of the squared log-normalizer.

  Confidence: CODE (formulas), MEMORY (constants).
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      loss=part(logit_stats.smoothed_nll, smoothing=smoothing),
      aggregation=part(aggregation.token_mean),
      penalties={
        'normalizer': weighted(normalizer_coefficient, part(logit_stats.squared_log_normalizer))
      },
    ),
    warm_start=False,
  )
