from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import part
from polgrad.sampling import behavior_policies


def seq_kd() -> Method:
  """Sequence-level distillation (arXiv:1606.07947): supervised learning on the teacher's samples.

      loss = -token mean of log pi,   y sampled from the teacher

  Its expectation is KL(teacher || student) of whole sequences plus a constant, up to the length that the
  mean divides by. Only the teacher's text is used. So a teacher that gives text alone, or has another
  tokenizer, needs no method: its answers are the data of `sft`.

  Differences: The paper takes the teacher's most likely sequence, found by beam search. Its samples,
  used here, keep all of its distribution. `greedy` decoding of the teacher is between the two.

  Confidence: PAPER.
  """
  return Method(
    collect=partial(
      collect.Rollouts, samples_per_prompt=1, behavior_policy=part(behavior_policies.teacher)
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
