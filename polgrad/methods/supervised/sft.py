from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import part


def sft() -> Method:
  """SFT (standard): supervised fine-tuning on the answers of the data.

      loss = -token mean of log pi

  The mean is over the tokens of the answers, including their stop tokens. The denominator is the
  number of these tokens in the whole batch, for any number of micro-batches and devices.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    warm_start=False,  # this method is what the warm start does
  )
