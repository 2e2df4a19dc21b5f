"""Divergences between the next-token distributions of a teacher (T) and of the student (S).

A function of `TABLE` fills the slot `divergence` of `objectives.Distillation`, or is one of the
`penalties` or `stats` of `objectives.PolicyGradient`. It reads logits over the whole vocabulary, so
it is evaluated in the chunked pass that computes logits (`models/token_stats.py`). The teacher is
detached here. Log-probabilities are computed in float32 at least.

Logits must be finite, with one exception: where both logits are -inf (a padded vocabulary), the token
adds 0 to value and gradient. A position whose largest logit is NaN or infinite has gradient exactly 0,
so that a masked position cannot spoil the gradient of a mean over the others; its value is NaN.
"""

from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._common import single
from polgrad.registry import table
from polgrad.types import Array


def forward_kl(teacher_logits: Array, logits: Array) -> Array:
  """KL(teacher || student) = sum T log(T / S): distillation on soft targets (arXiv:1503.02531).

  This is the mass-covering direction. The gradient with respect to the student's logits is S - T.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.

  Returns:
    [...], nats.
  """
  return _kl(*_log_probs(teacher_logits, logits))


def reverse_kl(teacher_logits: Array, logits: Array) -> Array:
  """KL(student || teacher) = sum S log(S / T): MiniLLM, per token (arXiv:2306.08543).

  This is the mode-seeking direction. The gradient with respect to the student's logits is
  S (log(S / T) - KL).

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.

  Returns:
    [...], nats.
  """
  teacher, student = _log_probs(teacher_logits, logits)
  return _kl(student, teacher)


def jensen_shannon(teacher_logits: Array, logits: Array, *, teacher_weight: float = 0.5) -> Array:
  """w KL(T || M) + (1 - w) KL(S || M) with M = w T + (1 - w) S: GKD (arXiv:2306.13649).

  The value is at most the entropy of (w, 1 - w), which is log 2 for w = 0.5. Divided by w it tends to
  `forward_kl` as w -> 0; divided by 1 - w it tends to `reverse_kl` as w -> 1. At w = 0 and w = 1 it
  would be 0, but some code bases return the two KLs there; this function refuses both.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    teacher_weight: w, the weight of the teacher in the mixture, in (0, 1).

  Returns:
    [...], nats.

  Raises:
    ValueError: teacher_weight outside (0, 1).
  """
  if not 0 < teacher_weight < 1:
    raise ValueError(f'teacher_weight must lie in (0, 1), got {teacher_weight}')
  teacher, student = _log_probs(teacher_logits, logits)
  # A token that both exclude has a log-probability of -inf in the mixture; 0 keeps the gradient finite.
  possible = jnp.maximum(teacher, student) != -jnp.inf
  mixture = jnp.logaddexp(
    jnp.where(possible, teacher, 0) + jnp.log(teacher_weight),
    jnp.where(possible, student, 0) + jnp.log1p(-teacher_weight),
  )
  return teacher_weight * _kl(teacher, mixture) + (1 - teacher_weight) * _kl(student, mixture)


def _log_probs(teacher_logits: Array, logits: Array) -> tuple[Array, Array]:
  """Log-probabilities (teacher, student) over the vocabulary; the teacher's are detached."""
  chex.assert_equal_shape([teacher_logits, logits])
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  finite_maximum = lambda x: jnp.isfinite(jnp.max(x, axis=-1, keepdims=True))
  finite = finite_maximum(teacher_logits) & finite_maximum(logits)
  logits = jnp.where(finite, logits, jax.lax.stop_gradient(logits))
  return jax.nn.log_softmax(single(teacher_logits)), jax.nn.log_softmax(single(logits))


def _kl(p: Array, q: Array) -> Array:
  """sum exp(p) (p - q) over the last axis, of log-probabilities; 0 log 0 is 0."""
  possible = p != -jnp.inf  # NaN is not taken for 0
  p, q = jnp.where(possible, p, 0), jnp.where(possible, q, 0)
  return jnp.sum(jnp.where(possible, jnp.exp(p) * (p - q), 0), axis=-1)


TABLE = table('divergences', forward_kl, reverse_kl, jensen_shannon)
Part = Annotated[Callable, TABLE]
