from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences
from polgrad.methods.base import Method
from polgrad.registry import Count, part


def distillm(
  *, steps: int, skew: float = 0.1, rise: float = 0.1, rises: Count = 10, memory: int = 16
) -> Method:
  """DistiLLM (arXiv:2402.03898): a skewed KL, on more and more of the student's text, mostly replayed.

      loss = token mean of KL(S || (1 - skew) T + skew S)

  T and S are the next-token distributions of teacher and student. With r uniform in [0, 1), a batch has
  the student's text if r < h, and otherwise the answers of the data. h begins at 0 and rises by `rise`.
  The student's text is sampled anew if r < h (1 - step / steps) or while the memory is not full, and
  replayed otherwise. The paper's other loss is the divergence `skew_forward_kl`.

  Differences: h rises `rises` times at equal distances, which needs no validation data. In the release
  it rises where the validation loss has not fallen below that at the last rise. The memory has a number
  of batches in place of 1000 rows. The release adds the likelihood of a plain-text corpus.

  Args:
    steps: batches of the run; the run fills it in.
    skew: weight of the student in the mixture, in (0, 1).
    rise: what is added to h each time.
    rises: how often it is added.
    memory: sampled batches that are remembered.

  Confidence: CODE.
  """
  return Method(
    collect=partial(
      collect.Mixed,
      samples_per_prompt=1,
      student_fraction=0.0,
      rise=rise,
      rise_every=max(steps // (rises + 1), 1),
      fade=steps,
      memory=memory,
    ),
    objective=part(
      objectives.Distillation,
      divergence=part(divergences.skew_reverse_kl, skew=skew),
      aggregation=part(aggregation.token_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
