from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers


def rl_struct(
  *, json_fields: tuple = ('answer',), structure: float = 1.0, content: float = 1.0
) -> Method:
  """RL-Struct (arXiv:2512.00319): answers in JSON, whose content counts once their structure is right.

      R = structure s_1 + content s_1 s_2 + s_1 s_2 r
      A_i = (R_i - mean_g) / (std_g + 1e-6)
      loss = -token mean of min(r A, clip(r, 0.8, 1.2) A)

  s_1 is 1 if the answer is a JSON object, s_2 the share of the `json_fields` that it has, and r the
  reward of the task. Both are terms of the reward with weight 0, `parsed` and `fields`.

  Differences: The paper's weights and penalties are not known to us. Its plain sum of rewards is GRPO
  with several terms of the reward.

  Args:
    json_fields: names that the object must have.
    structure: weight of being a JSON object.
    content: weight of the fields.

  Confidence: MEMORY (parts of the reward, from the abstract).
  """
  return Method(
    collect=partial(collect.Rollouts, terms=('parsed', 'fields')),
    credit=part(
      credit.laddered,
      credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
      rungs=('parsed', 'fields'),
      weights=(structure, content),
    ),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped),
      aggregation=part(aggregation.token_mean),
    ),
    rewards={
      'parsed': weighted(0.0, part(verifiers.json_fields)),
      'fields': weighted(0.0, part(verifiers.json_fields, fields=json_fields)),
    },
    minibatches=2,
  )
