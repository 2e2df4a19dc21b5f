from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, weights
from polgrad.methods.base import Method
from polgrad.registry import part


def dft() -> Method:
  """DFT (arXiv:2508.05629): supervised fine-tuning whose tokens are weighted by their probability.

      loss = -token mean of sg(p) log pi,   p = pi(token)

  The gradient is that of -p. The fixed point is the most frequent answer of the data, not its
  distribution, and a token that the policy finds nearly impossible is hardly learned.

  The authors' variant for rewards has the loss -A sg(max(p, 0.1)) log pi: `reinforce` with
  `--config.phases.train.objective.weights.probability.name=probability` and its `floor=0.1`.

  Differences: The mean is over the tokens of the whole batch; the authors average the means of
  micro-batches of 4 rows.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      weights={'probability': part(weights.probability)},
    ),
  )
