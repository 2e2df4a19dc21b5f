from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import aggregation, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def sampled_distillation(*, clip: float = 10.0, eps: float = 0.2) -> Method:
  """On-policy distillation by policy gradients (standard; as in arXiv:2306.13649): no logits needed.

      loss = -mean over rows of the token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
      A = clip(log T - log S_old, -clip, clip)   at the sampled token,   r = S / S_old

  The student S samples four completions of each prompt, and the teacher T gives the log-probability of
  each of their tokens. The expected gradient of a token is that of its KL(S || T), which
  `on_policy_distillation` computes without this noise. It needs the teacher's log-probabilities of the
  tokens alone, so the teacher may be behind a service.

  Differences: Some code bases use the ratio without bounds, summed over tokens: surrogate
  `importance_weighted`, aggregation `sequence_sum`.

  Args:
    clip: largest |A|, nats.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (formula), PAPER (clip).
  """
  return Method(
    collect=partial(collect.Rollouts, samples_per_prompt=4),
    credit=part(credit.teacher_log_ratio, clip=clip),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.sequence_mean),
    ),
    anchors={'teacher': part(optim.fixed)},
    restart=True,
    learns='imitate',
  )
