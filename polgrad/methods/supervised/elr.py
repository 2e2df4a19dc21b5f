from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def elr(*, coefficient: float = 3.0, decay: float = 0.7, top: int = 16) -> Method:
  """Early-learning regularisation (arXiv:2007.00151): answers of which some are wrong, not memorised.

      loss = token mean of -log pi(y) + coefficient log(1 - <t, pi>)

  t is the running mean of what the policy predicted for this token of this row of the data, t <- decay t
  + (1 - decay) pi each time that the row is drawn, from 0. A model first learns what most answers agree
  on; the second part holds it there, and outweighs the gradient of an answer that disagrees. It needs
  several epochs. Coefficient 0 is `sft`. `elr_averaged` needs neither epochs nor a memory of rows.

  Differences: The paper classifies images. For each token only the `top` largest entries of t are kept,
  and others count as 0. 1 - <t, pi> is at least 1e-4, while the code bounds each probability by 1e-4,
  which with a large vocabulary would change most of them. pi of the running mean costs another
  forward pass.

  Args:
    coefficient: lambda; 3 for CIFAR-10, 7 for CIFAR-100 and 1 for asymmetric noise in the paper.
    decay: beta; 0.7 for CIFAR-10, and 0.9 for CIFAR-100 and asymmetric noise.
    top: entries of t that are kept.

  Confidence: CODE (formula and constants), DERIVED (for language models).
  """
  return Method(
    collect=partial(collect.EarlyTargets, decay=decay, top=top),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      penalties={'early_learning': weighted(coefficient, part(logit_stats.early_learning_of_rows))},
    ),
    warm_start=False,
  )
