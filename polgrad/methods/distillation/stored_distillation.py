from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part


def stored_distillation(*, completions: str = '', k: AtLeastOne = 16) -> Method:
  """Distillation of stored top logits (standard; losses of arXiv:2306.13649): no teacher in the run.

      loss = token mean of sum_c T_c log(T_c / S_c),   c in the teacher's k likeliest tokens and `other`

  The completions were drawn once, by the student that the run begins with, and the k likeliest tokens of
  the teacher at each of their places were stored: `python -m polgrad.teacher_logp` writes them to files.
  `other` holds the probability of all tokens that are not listed. So the loss is a lower bound of the
  forward KL over the whole vocabulary on these completions, and equal to it where k is its size. A
  student that can be T becomes T.

  Args:
    completions: folder of the files.
    k: listed tokens of each position.

  Confidence: CODE.
  """
  inner = part(divergences.forward_kl)
  return Method(
    collect=partial(collect.Stored, samples_per_prompt=1, path=completions, top=k),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.listed, divergence=inner),
      aggregation=part(aggregation.token_mean),
    ),
    learns='imitate',
  )
