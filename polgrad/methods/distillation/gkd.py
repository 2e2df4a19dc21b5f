from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import part


def gkd(*, student_fraction: float = 0.5, teacher_weight: float = 0.5) -> Method:
  """GKD (arXiv:2306.13649): a Jensen-Shannon divergence on the student's samples and on given answers.

      loss = token mean of w KL(T || M) + (1 - w) KL(S || M),   M = w T + (1 - w) S

  T and S are the next-token distributions of teacher and student, over the whole vocabulary. Each batch
  is sampled by the student with probability `student_fraction`, and otherwise has the answers of the
  data. No gradient flows through the sampling. For the limits w = 0 and w = 1 choose the divergences
  `forward_kl` and `reverse_kl`. With student_fraction = 1 and `reverse_kl` this is
  `on_policy_distillation`, and with 0 and `forward_kl` in expectation sequence-level distillation, if
  the answers are the teacher's.

  Differences: The released trainer samples at temperature 0.9 and computes the loss at 1; here a
  temperature of the collector applies to both.

  Args:
    student_fraction: probability lambda that a batch is the student's.
    teacher_weight: w, beta of the paper, in (0, 1).

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Mixed, samples_per_prompt=1, student_fraction=student_fraction),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.jensen_shannon, teacher_weight=teacher_weight),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
