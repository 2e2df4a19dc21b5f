import dataclasses
from functools import partial
from typing import Annotated

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import Range, part
from polgrad.sampling import behavior_policies


def star(
  *,
  steps: int,
  iterations: Annotated[int, Range(at_least=1, at_most=100)] = 3,
  growth: Annotated[float, Range(above=0, at_most=10)] = 1.2,
  threshold: float = 1.0,
  hint: str = '{prompt}\n(The answer is {answer}.)\n',
) -> Method:
  """STaR (arXiv:2203.14465): a model learns the reasoning that led it to right answers.

      loss = -token mean of log pi over one sample of each prompt, if R >= threshold

  The samples are of the policy at the end of the iteration before, the anchor `previous`. Where its
  sample is wrong, the prompt is asked again with the answer as a hint (rationalisation), and a right
  sample is learned without the hint. Each iteration is a phase that begins with the base model again,
  and has `growth` times as many steps as the one before.

  Differences: The paper draws all samples of an iteration before it learns from them; here a step draws
  its own, of the same policy. Hints of the paper are few-shot prompts.

  Args:
    steps: batches of all iterations; the run fills it in.
    iterations: number of phases; the last is `train`.
    growth: of the steps from one iteration to the next.
    threshold: least reward of a sample that is learned.
    hint: the prompt with a hint, with {prompt} and {answer}.

  Confidence: MEMORY (the formula is certain).
  """
  weights = [growth**i for i in range(iterations)]
  sizes = [max(round(steps * w / sum(weights)), 1) for w in weights]
  one = Method(
    collect=partial(
      collect.Hinted,
      samples_per_prompt=1,
      threshold=threshold,
      hint=hint,
      behavior_policy=part(behavior_policies.previous),
      choose=part(collect.picks.above, threshold=threshold, rows=1),
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    anchors={'previous': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
  before = {
    f'iteration_{i}': dataclasses.replace(one, steps=size)
    for i, size in enumerate(sizes[:-1], start=1)
  }
  return dataclasses.replace(one, steps=sizes[-1], before=before)
