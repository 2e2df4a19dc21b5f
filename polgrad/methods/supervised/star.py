import dataclasses
import math
from functools import partial
from typing import Annotated

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, Range, part
from polgrad.sampling import behavior_policies


def star(
  *,
  steps: int,
  iterations: Annotated[int, Range(at_least=1, at_most=100)] = 3,
  growth: Annotated[float, Range(above=0, at_most=10)] = 1.2,
  epochs: AtLeastOne = 1,
  restart: bool = True,
  threshold: float = 1.0,
  hint: str = '{prompt}\n(The answer is {answer}.)\n',
) -> Method:
  """STaR (arXiv:2203.14465): a model learns the reasoning that led it to right answers.

      loss = -token mean of log pi over one sample of each prompt, if R >= threshold

  The samples are of the policy at the end of the iteration before, the anchor `previous`. Where its
  sample is wrong, the prompt is asked again with the answer as a hint (rationalisation), and a right
  sample is learned without the hint. Each iteration is a phase that begins with the base model again,
  and has `growth` times as many steps as the one before. Its first step draws all samples: one of every
  prompt, or until there are enough for `epochs` passes in its steps.

  Differences: Hints of the paper are few-shot prompts. If fewer samples are right than `epochs` passes
  need, there are more passes over them.

  Args:
    steps: batches of all iterations; the run fills it in.
    iterations: number of phases; the last is `train`.
    growth: of the steps from one iteration to the next.
    epochs: passes over the right samples of an iteration, at least.
    restart: whether an iteration begins with the base model; False continues with the policy, as expert
      iteration does.
    threshold: least reward of a sample that is learned.
    hint: the prompt with a hint, with {prompt} and {answer}.

  Confidence: MEMORY (the formula is certain).
  """
  weights = [growth**i for i in range(iterations)]
  sizes = [max(round(steps * w / sum(weights)), 1) for w in weights]

  def iteration(size: int, **options) -> Method:
    sampling = partial(
      collect.Hinted,
      samples_per_prompt=1,
      sample_first=math.ceil(size / epochs),
      sample_first_most=size,
      threshold=threshold,
      hint=hint,
      behavior_policy=part(behavior_policies.previous),
      choose=part(collect.picks.above, threshold=threshold, rows=1),
    )
    return dataclasses.replace(one, collect=sampling, steps=size, **options)

  one = Method(
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    anchors={'previous': part(optim.fixed)},
    restart=restart,
    learns='imitate',
  )
  before = {f'iteration_{i}': iteration(size) for i, size in enumerate(sizes[:-1], start=1)}
  return iteration(sizes[-1], before=before)
