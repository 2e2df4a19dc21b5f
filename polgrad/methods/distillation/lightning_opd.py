from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def lightning_opd(*, completions: str = '', clip: float = 10.0, eps: float = 0.2) -> Method:
  """Lightning OPD (arXiv:2604.13010): on-policy distillation without a teacher in the run.

      loss = -mean over rows of the token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
      A = clip(log T - log S_old, -clip, clip)   at the sampled token,   r = S / S_old

  This is the loss of `sampled_distillation`. But the completions were drawn once, by the student S_0
  that the run begins with, and log T of their tokens was computed then: `python -m polgrad.teacher_logp`
  writes both to files. So no model but the student is in memory. S_old is the student at the start of
  the update, so r = 1 with one update a batch, and T is the fixed point. Far from S_0 the gradient
  differs from the on-policy one by Cov(S / S_0, gradient), at most G sqrt(E (sum |A|)^2 chi2(S || S_0)).

  T must be the model whose text S_0 was tuned on. What another teacher says after words that S_0 hardly
  says is not in the files (docs/distillation.md).

  Differences: The release does not clip A, and samples at temperature 0.8. Here the temperature is that
  of the collector, 1 by default; both log-probs are at it.

  Args:
    completions: folder of the files.
    clip: largest |A|, nats.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (formula), PAPER (clip).
  """
  return Method(
    collect=partial(collect.Stored, samples_per_prompt=1, path=completions),
    credit=part(credit.teacher_log_ratio, clip=clip),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
    ),
    learns='imitate',
  )
