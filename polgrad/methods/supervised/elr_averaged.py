from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def elr_averaged(*, coefficient: float = 3.0, decay: float = 0.99) -> Method:
  """ELR by averaged parameters (arXiv:2007.00151): answers of which some are wrong, not memorised.

      loss = token mean of -log pi(y) + coefficient log(1 - <t, pi>)

  t is the next-token distribution of a running mean of the policy, theta_t <- decay theta_t +
  (1 - decay) theta after every update. A model first learns what most answers agree on; the second part
  holds it there, and outweighs the gradient of an answer that disagrees. Coefficient 0 is `sft`.

  Differences: A mean of parameters replaces the running means of predictions that `elr` has. `elr_plus`
  has both, and two networks. 1 - <t, pi> is at least 1e-4, while the code bounds each probability by
  1e-4, which with a large vocabulary would change most of them.

  Args:
    coefficient: lambda; 3 for CIFAR-10 and 7 for CIFAR-100 in the paper.
    decay: of the running mean of parameters.

  Confidence: CODE (formula), DERIVED (for language models; decay).
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      penalties={'early_learning': weighted(coefficient, part(logit_stats.early_learning))},
    ),
    anchors={'teacher': part(optim.ema, decay=decay)},
    warm_start=False,
  )
