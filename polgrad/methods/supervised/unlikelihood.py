from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def unlikelihood(*, coefficient: float = 1.0, prompt: bool = False) -> Method:
  """Unlikelihood training (arXiv:1908.04319): supervised learning that pushes repetitions down.

      loss = token mean of -log pi(y_t) - coefficient sum_{c in C_t} log(1 - pi(c))

  C_t is the set of tokens before position t, without y_t itself; 1 - pi(c) is at least 1e-5. Coefficient
  0 is `sft`. `unlikelihood_sequence` treats repetitions in own samples.

  Differences: Earlier tokens are those of the answer, or of its whole document with `prompt`. The paper
  trains on plain text, which has no prompts.

  Args:
    coefficient: alpha, of the unlikelihood.
    prompt: whether repetitions of the prompt are pushed down too.

  Confidence: CODE (formula), MEMORY (coefficient).
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      penalties={
        'repetition': weighted(coefficient, part(logit_stats.unlikelihood, prompt=prompt))
      },
    ),
    warm_start=False,
  )
