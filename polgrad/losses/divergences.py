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
from polgrad.registry import AtLeastOne, Fraction, Range, table
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
  _check_inside('teacher_weight', teacher_weight)
  teacher, student = _log_probs(teacher_logits, logits)
  mixture = _mixture(teacher, student, teacher_weight)
  return teacher_weight * _kl(teacher, mixture) + (1 - teacher_weight) * _kl(student, mixture)


def skew_forward_kl(teacher_logits: Array, logits: Array, *, skew: float = 0.1) -> Array:
  """KL(T || skew T + (1 - skew) S): DistiLLM (arXiv:2402.03898).

  The value is at most -log skew. The gradient is that of a weighted likelihood whose weights lie between
  0 and (1 - skew) / skew, where `forward_kl` has weights T / S without a bound. skew -> 0 is
  `forward_kl`.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    skew: weight of the teacher in the mixture, in (0, 1).

  Returns:
    [...], nats.

  Raises:
    ValueError: skew outside (0, 1).
  """
  _check_inside('skew', skew)
  teacher, student = _log_probs(teacher_logits, logits)
  return _kl(teacher, _mixture(teacher, student, skew))


def skew_reverse_kl(teacher_logits: Array, logits: Array, *, skew: float = 0.1) -> Array:
  """KL(S || (1 - skew) T + skew S): DistiLLM (arXiv:2402.03898).

  The value is at most -log skew, also where the teacher excludes a token. skew -> 0 is `reverse_kl`.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    skew: weight of the student in the mixture, in (0, 1).

  Returns:
    [...], nats.

  Raises:
    ValueError: skew outside (0, 1).
  """
  _check_inside('skew', skew)
  teacher, student = _log_probs(teacher_logits, logits)
  return _kl(student, _mixture(teacher, student, 1 - skew))


def symmetric_kl(teacher_logits: Array, logits: Array, *, reverse_weight: Fraction = 0.5) -> Array:
  """(1 - c) KL(T || S) + c KL(S || T): both directions (arXiv:2402.03898, whose code
  has c = 0.9).

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    reverse_weight: c in [0, 1]; 0 is `forward_kl`, 1 is `reverse_kl`.

  Returns:
    [...], nats.
  """
  teacher, student = _log_probs(teacher_logits, logits)
  return (1 - reverse_weight) * _kl(teacher, student) + reverse_weight * _kl(student, teacher)


def alpha_divergence(teacher_logits: Array, logits: Array, *, alpha: float = 0.5) -> Array:
  """(sum T^a S^(1 - a) - 1) / (a (a - 1)): the family between the two KLs (standard; Amari).

  a -> 1 is `forward_kl` and a -> 0 is `reverse_kl`. a = 2 is half of the chi-square divergence
  sum (T - S)^2 / S, and a = 1/2 twice the squared Hellinger distance sum (sqrt T - sqrt S)^2.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    alpha: a, any number but 0 and 1. Beyond [0, 1] the value is unbounded.

  Returns:
    [...], at least 0.

  Raises:
    ValueError: alpha is 0 or 1.
  """
  if alpha in (0, 1):
    raise ValueError(
      f'alpha={alpha}: use {"forward" if alpha else "reverse"}_kl, which is the limit'
    )
  teacher, student = _log_probs(teacher_logits, logits)
  teacher, student, possible = _finite(teacher, student)
  power = jnp.exp(alpha * teacher + (1 - alpha) * student)
  # Both masses are 1. Subtracting them token by token loses fewer digits than subtracting 1 at the end.
  excess = power - alpha * jnp.exp(teacher) - (1 - alpha) * jnp.exp(student)
  return jnp.sum(jnp.where(possible, excess, 0), axis=-1) / (alpha * (alpha - 1))


def total_variation(teacher_logits: Array, logits: Array) -> Array:
  """sum |T - S| / 2: the largest difference of the probabilities of an event (f-Distill,
  arXiv:2307.15190, per token).

  Its gradient ignores by how much a token is too likely. By Pinsker's inequality it is at most
  sqrt(KL / 2), for either KL.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.

  Returns:
    [...], in [0, 1].
  """
  teacher, student = _log_probs(teacher_logits, logits)
  return 0.5 * jnp.sum(jnp.abs(jnp.exp(teacher) - jnp.exp(student)), axis=-1)


def entropy_aware(
  teacher_logits: Array,
  logits: Array,
  *,
  threshold: Annotated[float, Range(at_least=0)] = 0.8,
  kept: Fraction = 1.0,
) -> Array:
  """KL(S || T), and where the teacher's entropy exceeds `threshold`, kept KL(S || T) + KL(T || S): the
  direction depends on how sure the teacher is (EOPD, arXiv:2603.07079).

  Where the teacher is sure, its likeliest token is sought. Where it allows several tokens, all of them
  are to be covered.

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    threshold: entropy of the teacher, nats.
    kept: weight of the reverse KL above it: 1 adds the forward KL (the paper), 0 changes over to it.

  Returns:
    [...], nats.
  """
  teacher, student = _log_probs(teacher_logits, logits)
  possible = teacher != -jnp.inf
  surprise = jnp.where(possible, -jnp.exp(teacher) * jnp.where(possible, teacher, 0), 0)
  unsure = jnp.sum(surprise, axis=-1) > threshold
  forward, reverse = _kl(teacher, student), _kl(student, teacher)
  return jnp.where(unsure, kept * reverse + forward, reverse)


FULL = table(
  'divergences',
  *(forward_kl, reverse_kl, jensen_shannon, skew_forward_kl, skew_reverse_kl, symmetric_kl),
  *(alpha_divergence, total_variation, entropy_aware),
)


def top_k(
  teacher_logits: Array,
  logits: Array,
  *,
  divergence: Annotated[Callable, FULL] = forward_kl,
  k: AtLeastOne = 16,
  of_teacher: bool = True,
  of_student: bool = False,
  bucket: bool = True,
) -> Array:
  """A divergence on the most likely tokens: all that a teacher allows that sends its top logits
  (standard).

  The compared tokens are usually the teacher's for the forward KL, the student's for the reverse KL, and
  both for mixtures. With `bucket` all other tokens are one further class: the result is at most the
  divergence over the whole vocabulary, for every f-divergence, and equal to it where k = V. Without it
  they are dropped and the rest is normalised again, so only the probabilities of the compared tokens
  relative to each other count. (Neither would be biased: probabilities that do not sum to 1 can give a
  negative divergence.)

  Args:
    teacher_logits: [..., V].
    logits: [..., V], of the student.
    divergence: of the restricted distributions; any other one of this module.
    k: number of most likely tokens; of a smaller vocabulary all.
    of_teacher: whether the teacher's k most likely tokens are compared.
    of_student: whether those of the student are; with both, the union is.
    bucket: whether the other tokens are one class; False drops them.

  Returns:
    [...], in the unit of the divergence.

  Raises:
    ValueError: neither the teacher's nor the student's tokens are compared.
  """
  if not (of_teacher or of_student):
    raise ValueError('top_k: of_teacher and of_student are False, so no token is compared')
  teacher, student = _log_probs(teacher_logits, logits)
  k = min(k, logits.shape[-1])
  chosen = [x for x, wanted in ((teacher, of_teacher), (student, of_student)) if wanted]
  ids = [jax.lax.top_k(jax.lax.stop_gradient(x), k)[1] for x in chosen]
  ids, repeated = _joined(ids)
  take = lambda x: jnp.where(repeated, -jnp.inf, jnp.take_along_axis(x, ids, axis=-1))
  return _restricted(divergence, take(teacher), take(student), bucket)


def listed(
  teacher_top_ids: Array,
  teacher_top_log_probs: Array,
  logits: Array,
  *,
  divergence: Annotated[Callable, FULL] = forward_kl,
  bucket: bool = True,
) -> Array:
  """A divergence on the tokens that a teacher lists, which is all that a service gives (standard).

  This is `top_k` of the teacher's tokens where the rest of its distribution is not known. With `bucket`
  the probability that the list leaves is that of one further class, and the result is at most the
  divergence over the whole vocabulary.

  Args:
    teacher_top_ids: i32[..., k], different tokens. An id below 0, or one that the student's model does
      not have, is no token, and its probability is part of the rest.
    teacher_top_log_probs: f32[..., k], their log-probabilities under the teacher, nats.
    logits: [..., V], of the student.
    divergence: of the restricted distributions; any other one of this module.
    bucket: whether the other tokens are one class; False drops them, and normalises the rest again.

  Returns:
    [...], in the unit of the divergence.
  """
  known = (teacher_top_ids >= 0) & (teacher_top_ids < logits.shape[-1])
  ids = jnp.where(known, teacher_top_ids, 0)
  student = jnp.take_along_axis(jax.nn.log_softmax(single(logits)), ids, axis=-1)
  teacher = jax.lax.stop_gradient(single(teacher_top_log_probs))
  pair = [jnp.where(known, x, -jnp.inf) for x in (teacher, student)]
  return _restricted(divergence, *pair, bucket)


def _restricted(divergence: Callable, teacher: Array, student: Array, bucket: bool) -> Array:
  """A divergence of log-probs [..., k] of some tokens, and with `bucket` of the class of all others."""
  pair = [teacher, student]
  if bucket:
    pair = [jnp.concatenate([x, _rest(x)], axis=-1) for x in pair]
  return divergence(*pair)


def _joined(ids: list[Array]) -> tuple[Array, Array]:
  """Both supports as one, i32[..., n], and which entries are there a second time, bool[..., n]."""
  if len(ids) == 1:
    return ids[0], jnp.zeros(ids[0].shape, bool)
  first, second = ids
  again = jnp.any(second[..., :, None] == first[..., None, :], axis=-1)
  repeated = jnp.concatenate([jnp.zeros(first.shape, bool), again], axis=-1)
  return jnp.concatenate(ids, axis=-1), repeated


def _rest(log_probs: Array) -> Array:
  """The log-probability [..., 1] of all tokens that are not listed; at least about 1e-7."""
  mass = jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
  return jnp.log1p(-jnp.minimum(mass, 1 - 1e-7))


def _check_inside(name: str, value: float) -> None:
  if not 0 < value < 1:
    raise ValueError(f'{name} must lie in (0, 1), got {value}')


def _mixture(teacher: Array, student: Array, teacher_weight: float) -> Array:
  """log(w T + (1 - w) S) of log-probabilities, with w = teacher_weight."""
  teacher, student, _ = _finite(teacher, student)
  return jnp.logaddexp(teacher + jnp.log(teacher_weight), student + jnp.log1p(-teacher_weight))


def _finite(teacher: Array, student: Array) -> tuple[Array, Array, Array]:
  """Both, with 0 in place of tokens that both exclude, and where they do not.

  In a mixture or a product such a token would be -inf, and its gradient NaN.
  """
  possible = jnp.maximum(teacher, student) != -jnp.inf
  return jnp.where(possible, teacher, 0), jnp.where(possible, student, 0), possible


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


TABLE = FULL | table('divergences', top_k)
LISTED = table('divergences', listed)  # where the teacher's logits are not known
Part = Annotated[Callable, TABLE | LISTED]
