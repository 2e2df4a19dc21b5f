from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def mean_teacher(*, decay: float = 0.99, consistency: float = 1.0) -> Method:
  """Mean teacher (arXiv:1703.01780): answers, and the running mean of the policy as a teacher.

      loss = token mean of -log pi(y) + consistency KL(T || pi)
      T <- decay T + (1 - decay) pi, of parameters, after every update

  decay = 1 keeps the initial policy as the teacher, which holds the policy near it; decay = 0 makes the
  teacher the policy itself, and the second term vanishes. With
  `--config.phases.train.anchors.teacher.corrected=True` the teacher forgets the initial policy at once.

  Differences: The paper compares squared probabilities of differently noised inputs. Here both read the
  same text, so the term slows changes rather than smoothing predictions.

  Args:
    decay: of the running mean, in [0, 1].
    consistency: weight of the teacher.

  Confidence: PAPER (rule), DERIVED (for language models).
  """
  mean = part(aggregation.token_mean)
  distilled = part(
    objectives.Distillation, divergence=part(divergences.forward_kl), aggregation=mean
  )
  return Method(
    collect=partial(collect.Demonstrations),
    objective=part(
      objectives.WeightedSum,
      streams={
        'answers': weighted(1.0, part(objectives.Supervised, aggregation=mean)),
        'teacher': weighted(consistency, distilled),
      },
    ),
    anchors={'teacher': part(optim.ema, decay=decay)},
    warm_start=False,
  )
