from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import part


def top_k_distillation(*, k: int = 16) -> Method:
  """Distillation of top logits (standard; losses of arXiv:2306.13649): k tokens and all others.

      loss = token mean of sum_c S_c log(S_c / T_c),   c in the student's k likeliest tokens and `other`

  The student samples. `other` holds the probability of all tokens that are not listed. So the loss is
  a lower bound of the reverse KL over the whole vocabulary, and equal to it where k is its size.

  Args:
    k: listed tokens of each position.

  Confidence: CODE.
  """
  inner = part(divergences.reverse_kl)
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.top_k, divergence=inner, k=k, of_teacher=False, of_student=True),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
