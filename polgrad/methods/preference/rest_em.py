from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def rest_em(
  *, steps: int, samples: int = 8, keep: int = 4, threshold: float = 1.0, iterations: AtLeastOne = 3
) -> Method:
  """ReST-EM (arXiv:2312.06585): supervised learning on the samples that solve their prompt.

      loss = -token mean of log pi over at most `keep` answers of a prompt with R >= threshold

  The samples are of the policy at the start of an iteration, the anchor `previous`; a limit on the
  answers of a prompt keeps easy prompts from filling the data.

  Differences: The paper begins every iteration with the base model, which here is a phase with
  `restart`. ReST raises the threshold within an iteration.

  Args:
    steps: batches of the run; the run fills it in.
    samples: answers of a prompt.
    keep: of these, how many are learned at most.
    threshold: least reward of an answer that is learned.
    iterations: number of times that the sampling policy is renewed, evenly over the run.

  Confidence: MEMORY.
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      choose=part(collect.picks.above, threshold=threshold, rows=keep),
      behavior_policy=part(behavior_policies.previous),
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    anchors={'previous': part(optim.sync, every=max(steps // iterations, 1))},
    learns='imitate',
  )
