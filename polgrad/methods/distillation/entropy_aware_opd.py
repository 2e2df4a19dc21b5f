from functools import partial
from typing import Annotated

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import Fraction, Range, part


def entropy_aware_opd(
  *, threshold: Annotated[float, Range(at_least=0)] = 0.8, kept: Fraction = 1.0
) -> Method:
  """EOPD (arXiv:2603.07079): reverse KL on samples, and forward KL where the teacher is unsure.

      loss = token mean of KL(S || T)                    where the entropy of T is at most `threshold`
                           kept KL(S || T) + KL(T || S)  elsewhere

  The student S samples. Where the teacher T allows several next tokens, the reverse KL alone would let
  the student keep only one of them. With an infinite threshold this is `on_policy_distillation`, and
  with threshold 0 and kept 0 it is the forward KL on samples of the student.

  Differences: Both KLs are exact here; the paper estimates the reverse one by the sampled token, and
  takes the forward one over the teacher's likeliest tokens.

  Args:
    threshold: entropy of the teacher, nats.
    kept: weight of the reverse KL above it: 1 adds the forward KL (the paper), 0 changes over to it.

  Confidence: PAPER (idea), MEMORY (threshold).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=1),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.entropy_aware, threshold=threshold, kept=kept),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
