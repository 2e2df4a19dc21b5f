from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, Fraction, part, weighted


def ps_kd(*, steps: int, stages: AtLeastOne = 4, last: Fraction = 0.8) -> Method:
  """PS-KD (arXiv:2006.12000): answers softened by what the model itself predicted a stage ago.

      loss = token mean of -(1 - a) log pi(y) + a KL(P || pi),   a = last * e / stages in stage e

  P is the next-token distribution of the policy at the end of the stage before, and a = 0 in the first
  stage. The gradient by the logits is pi - (1 - a) one_hot(y) - a P, that of the cross-entropy with the
  mixed target. Answers that the model knew already are pushed less.

  Differences: A stage is a fraction of the run, not an epoch. P comes from a copy of the parameters;
  in the release it was stored for each image in the training pass, with the weights of that
  moment.

  Args:
    steps: updates of the run; the run fills it in.
    stages: number of stages.
    last: a in the last stage.

  Confidence: CODE (formula and last), DERIVED (for language models).
  """
  every = max(steps // stages, 1)
  sizes = dict(every=every, stages=stages, last=last)
  mean = part(aggregation.token_mean)
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.WeightedSum,
      streams={
        'answers': weighted(1.0, part(objectives.Supervised, aggregation=mean)),
        'earlier': weighted(
          1.0,
          part(objectives.Distillation, divergence=part(divergences.forward_kl), aggregation=mean),
        ),
      },
      schedules={
        'answers': part(optim.progressive_rest, **sizes),
        'earlier': part(optim.progressive, **sizes),
      },
    ),
    anchors={'teacher': part(optim.sync, every=every)},
    warm_start=False,
  )
