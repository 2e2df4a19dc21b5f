import math
from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.sampling import behavior_policies


def rft(
  *,
  steps: int,
  samples: AtLeastOne = 8,
  epochs: AtLeastOne = 3,
  threshold: float = 1.0,
  same: str = '',
) -> Method:
  """RFT (arXiv:2308.01825): the base model learns the answers and a tuned model's right samples.

      loss = -token mean of log pi over the answer and samples with R >= threshold, each text once

  The samples are of the anchor `reference`, the policy after the phase before (supervised learning on
  the answers); the policy itself begins again with the base model. All samples are drawn in the first
  step: of every prompt once, or until there are enough for `epochs` passes in the steps of the run. Of
  completions of a prompt with the same matches of `same`, such as the same equations in the same order,
  one is kept. If all were kept, the expected gradient of the samples' part would be that of
  log P(right sample).

  Differences: The paper draws 100 samples of each prompt. Verifiers judge the record's answer too. If
  fewer completions are kept than `epochs` passes need, there are more passes over them.

  Args:
    steps: batches of the run; the run fills it in.
    samples: drawn for a prompt.
    epochs: passes over what is kept, at least.
    threshold: least reward of a completion that is learned.
    same: regular expression of what makes two completions equal; '' is all words.

  Confidence: MEMORY (the formula is certain).
  """
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      sample_first=math.ceil(steps / epochs),
      sample_first_most=steps,
      demonstrations=1,
      behavior_policy=part(behavior_policies.reference),
      choose=part(collect.picks.distinct, threshold=threshold, pattern=same),
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    anchors={'reference': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
