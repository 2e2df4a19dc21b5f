from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import part


def raft(*, samples: int = 8, keep: int = 1, epochs: int = 4) -> Method:
  """RAFT (arXiv:2304.06767): supervised learning on the best samples of each prompt.

      loss = -token mean of log pi over the `keep` answers with the largest rewards

  This is the authors' mode `local`, best of n. Their mode `top`, the best of the whole batch, is
  `choose=collect.picks.top_of_batch`; a prompt whose answers all have low rewards is then left out.

  Args:
    samples: answers of a prompt.
    keep: of these, how many are learned.
    epochs: updates on a batch of answers.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      choose=part(collect.picks.best, rows=keep),
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    learns='imitate',
    epochs=epochs,
  )
