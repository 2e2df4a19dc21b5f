from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import part


def random_teacher() -> Method:
  """Random teachers (arXiv:2302.12091): a model with random parameters is distilled into another.

      loss = token mean of KL(T || S)

  T is the model as it was initialised, and never changes. S is initialised again and learns to imitate
  it on given text, whose tokens are inputs but never targets. It is a probe: T knows nothing, so what S
  learns comes from the training itself. A student that begins at T has loss and gradient 0.

  Differences: The paper trains images without labels and finds better features than the teacher's by a
  linear probe; here a token's prefix is the input. The model must not be pretrained.

  Confidence: CODE.
  """
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.forward_kl),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    warm_start=False,
  )
