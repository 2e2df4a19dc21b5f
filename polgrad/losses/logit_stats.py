"""Statistics of the next-token distribution: one number per token, computed from the logits.

A function of `TABLE` fills a slot of `stats`, for example that of `objectives.PolicyGradient`; losses
then read the result by the name of the slot. Statistics are evaluated in chunks of tokens
(`models/token_stats.py`), so logits [B, T, V] are not held in memory at once. A function reads what it
names: `logits` f32[..., V], `tokens` i32[...], the last hidden state `hidden` f32[..., D], the tokens
before, `context` i32[..., T] and `context_mask` bool[..., T], and with a teacher `teacher_logits`
f32[..., V].

In formulas, pi is softmax(logits) and v = e_token - pi is the score: the gradient of log pi(token)
with respect to the logits.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import Positive, table
from polgrad.types import Array


def logp(logits: Array, tokens: Array) -> Array:
  """Log-probability of the tokens in nats, log softmax(logits)[tokens]; f32[..., V], i32[...] ->
  f32[...]."""
  return _logp(logits, tokens)


@jax.custom_jvp
def _logp(logits: Array, tokens: Array) -> Array:
  shifted, log_sum = _shifted(logits)
  return _chosen(shifted, tokens) - log_sum


# The derivative is the score. JAX's rules would scatter the cotangent of the chosen logit, a loop over
# tokens on CPUs, and add to it that of the sum; as one expression, both are one pass over the logits.
@_logp.defjvp
def _logp_jvp(primals: tuple[Array, Array], tangents: tuple) -> tuple[Array, Array]:
  (logits, tokens), (moved, _) = primals, tangents
  shifted, log_sum = _shifted(logits)
  own = jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)
  score = own - jnp.exp(shifted - log_sum[..., None])
  return _chosen(shifted, tokens) - log_sum, jnp.sum(score * moved, axis=-1)


def entropy(logits: Array) -> Array:
  """Entropy in nats, -sum_v p_v log p_v; f32[..., V] -> f32[...]. Logits may be -inf."""
  shifted, log_sum = _shifted(logits)
  log_probs = shifted - log_sum[..., None]
  return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, log_probs, 0), axis=-1)


def _shifted(logits: Array) -> tuple[Array, Array]:
  """(x, log sum exp x) with x = logits - max: log softmax is their difference. f32[..., V], f32[...].

  Statistics that begin with it share the passes over the logits that it takes.
  """
  shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  return shifted, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def _chosen(x: Array, tokens: Array) -> Array:
  """The entry of the last axis of x that each token names."""
  return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def log_normalizer(logits: Array) -> Array:
  """logsumexp(logits): the state value if the logits are interpreted as Q values (arXiv:2505.15311);
  f32[..., V] -> f32[...]."""
  return jax.nn.logsumexp(logits, axis=-1)


def token_logit(logits: Array, tokens: Array) -> Array:
  """The logit of the token itself, not normalised: the value of the prefix that ends with it, if the
  logits are values (arXiv:2310.17022); f32[..., V], i32[...] -> f32[...]."""
  return _chosen(logits, tokens)


def expected_logit(logits: Array, teacher_logits: Array) -> Array:
  """sum_z p_teacher(z) logit_z: the value of the prefix before the token, if the logits are values of
  next tokens and the teacher continues (arXiv:2310.17022). No gradient flows through it.

  Args:
    logits: f32[..., V], values.
    teacher_logits: f32[..., V], of the policy whose continuations are valued.

  Returns:
    f32[...], in units of the values.
  """
  probs = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits), axis=-1)
  return jnp.sum(probs * jax.lax.stop_gradient(logits), axis=-1)


def score_norm(logits: Array, tokens: Array) -> Array:
  """|v|^2 = 1 - 2 pi_token + sum pi^2, the squared norm of the score v = e_token - pi.

  It weighs the rows of optimal baselines (arXiv:2602.07078), and `selections.curvature` reads it. No
  gradient flows through it.

  Args:
    logits: f32[..., V].
    tokens: i32[...].

  Returns:
    f32[...], in [0, 2].
  """
  probs, chosen = _probabilities(logits, tokens)
  return 1 - 2 * chosen + jnp.sum(jnp.square(probs), axis=-1)


def score_fisher(logits: Array, tokens: Array) -> Array:
  """v' F v with the score v = e_token - pi and the Fisher matrix F = diag pi - pi pi' of the logits.

  At pi = pi_old the ratio pi / pi_old has the Hessian v v' - F with respect to the logits, so its
  curvature along v is `score_norm`^2 - `score_fisher`: CAPO (arXiv:2510.00819). No gradient flows
  through it.

  Args:
    logits: f32[..., V].
    tokens: i32[...].

  Returns:
    f32[...], >= 0.
  """
  probs, chosen = _probabilities(logits, tokens)
  mean = chosen - jnp.sum(jnp.square(probs), axis=-1)
  return chosen - 2 * jnp.square(chosen) + jnp.sum(probs**3, axis=-1) - jnp.square(mean)


def hidden_norm(hidden: Array) -> Array:
  """|h|^2 of the hidden state from which the token's logits are computed; f32[..., D] -> f32[...].

  `score_norm` times `hidden_norm` is the squared norm of the gradient of log pi(token) with respect to
  the weights of the last layer. No gradient flows through it.
  """
  return jnp.sum(jnp.square(jax.lax.stop_gradient(hidden)), axis=-1)


def proxy_logp(logits: Array, tokens: Array, *, kappa: float = 0.02) -> Array:
  """Log-probability of the token under the distribution without its tail: Lp-Reg (arXiv:2510.03222).

  Tokens with pi < kappa max pi get probability 0 and the others are normalised again. No gradient
  flows through it.

  Args:
    logits: f32[..., V].
    tokens: i32[...].
    kappa: smallest probability that is kept, as a fraction of the largest one.

  Returns:
    f32[...], nats; about -1e4 for a token in the tail.
  """
  logits = jax.lax.stop_gradient(logits)
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  return logp(jnp.where(logits >= jnp.log(kappa), logits, -1e4), tokens)


def log_collision(logits: Array) -> Array:
  """log sum_v pi_v^2, the log-probability that two draws agree, nats: WPO (arXiv:2406.11827).

  exp(log pi(token) - this) has the mean 1 over tokens that pi draws. f32[..., V] -> f32[...].
  """
  return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)


def largest_logp(logits: Array) -> Array:
  """max_v log pi_v, the log-probability of the greedy token, nats; f32[..., V] -> f32[...]."""
  return jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def one_token_rollout(
  logits: Array, tokens: Array, *, beta: float = -0.1, temperature: float = 1.3
) -> Array:
  """-sum_a sg(q_a R_a) log pi_a, R_a = 1 for the token of the data and beta for every other, q =
  softmax(logits / temperature): OTR (arXiv:2509.26313).

  The paper replaces supervised learning by REINFORCE on one token sampled from q; this is its
  expectation over q. At temperature 1 its gradient is pi_token (1 - beta) times that of supervised
  learning.

  Args:
    logits: f32[..., V]; carries gradient.
    tokens: i32[...], the tokens of the data.
    beta: reward of a token that is not the data's.
    temperature: temperature of the sampling distribution q.

  Returns:
    f32[...], a loss to be minimised.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  log_probs = jnp.where(log_probs > -jnp.inf, log_probs, 0)
  sampler = jax.lax.stop_gradient(jax.nn.softmax(logits / temperature, axis=-1))
  rewards = beta + (1 - beta) * jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)
  return -jnp.sum(sampler * rewards * log_probs, axis=-1)


def smoothed_nll(logits: Array, tokens: Array, *, smoothing: float = 0.1) -> Array:
  """-(1 - e) log pi(token) - e mean_v log pi_v, e = smoothing: label smoothing (arXiv:1512.00567).

  It is the cross-entropy with the target (1 - e) one_hot(token) + e / V, so the gradient by the logits
  is pi minus that target. An entry whose logit is -inf is no class: it is not counted in V.

  Args:
    logits: f32[..., V]; carries gradient.
    tokens: i32[...], the tokens of the data.
    smoothing: part of the target that is spread over all classes.

  Returns:
    f32[...], nats.

  Raises:
    ValueError: smoothing outside [0, 1).
  """
  if not 0 <= smoothing < 1:
    raise ValueError(f'smoothing must be in [0, 1), got {smoothing}')
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  classes = log_probs > -jnp.inf
  total = jnp.sum(jnp.where(classes, log_probs, 0), axis=-1)
  return -(1 - smoothing) * logp(logits, tokens) - smoothing * total / jnp.sum(classes, axis=-1)


def squared_log_normalizer(logits: Array) -> Array:
  """logsumexp(logits)^2: the z-loss (arXiv:2204.02311), f32[..., V] -> f32[...]. Carries gradient.

  The cross-entropy is the same for logits that are all shifted by a constant. With this term beside it,
  for any positive coefficient, the optimum has the same probabilities and a log-normalizer of 0.
  """
  return jnp.square(jax.nn.logsumexp(logits, axis=-1))


def early_learning(logits: Array, teacher_logits: Array, *, floor: Positive = 1e-4) -> Array:
  """log max(1 - <t, pi>, floor) with targets t = softmax(teacher_logits): early-learning regularisation
  (arXiv:2007.00151).

  Its gradient by logit k is -pi_k (t_k - <t, pi>) / (1 - <t, pi>), or 0 below the floor: the logits of
  what the teacher believes rise, the more, the surer both are. So a label that contradicts what was
  learned early, when most labels were still unknown, is not memorised.

  Args:
    logits: f32[..., V]; carries gradient.
    teacher_logits: f32[..., V], of the running mean that gives the targets.
    floor: least value of 1 - <t, pi>; without it the penalty has no lower bound.

  Returns:
    f32[...], in [log floor, 0].
  """
  targets = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits), axis=-1)
  inner = jnp.sum(jnp.exp(targets + jax.nn.log_softmax(logits, axis=-1)), axis=-1)
  return jnp.log(jnp.maximum(1 - inner, floor))


def early_learning_of_rows(
  logits: Array, early_tokens: Array, early_targets: Array, *, floor: Positive = 1e-4
) -> Array:
  """`early_learning` with the running means of earlier predictions of the same row (arXiv:2007.00151).

  Args:
    logits: f32[..., V]; carries gradient.
    early_tokens: i32[..., k], the tokens that have a target.
    early_targets: f32[..., k], t of these tokens; t of all others is 0.
    floor: least value of 1 - <t, pi>; without it the penalty has no lower bound.

  Returns:
    f32[...], in [log floor, 0]; 0 where the targets are.
  """
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), early_tokens, axis=-1)
  inner = jnp.sum(jax.lax.stop_gradient(early_targets) * jnp.exp(log_probs), axis=-1)
  return jnp.log(jnp.maximum(1 - inner, floor))


def mixed_nll(logits: Array, mixed_tokens: Array, mixed_weights: Array) -> Array:
  """-sum_k w_k log pi(token_k): the cross-entropy with a target that is a mixture, mixup
  (arXiv:1710.09412).

  Args:
    logits: f32[..., V]; carries gradient.
    mixed_tokens: i32[..., k].
    mixed_weights: f32[..., k], of these tokens; where they add up to 1 this is a cross-entropy.

  Returns:
    f32[...], nats times the sum of the weights.
  """
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), mixed_tokens, axis=-1)
  weights = jax.lax.stop_gradient(mixed_weights)
  return -jnp.sum(jnp.where(weights > 0, weights * log_probs, 0), axis=-1)


def most_likely(logits: Array, *, k: int) -> Array:
  """The k most likely tokens, as numbers, and their probabilities; f32[..., V] -> f32[..., 2 k]."""
  probs, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), min(k, logits.shape[-1]))
  found = [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, k - x.shape[-1])]) for x in (ids, probs)]
  return jnp.concatenate([x.astype(logits.dtype) for x in found], axis=-1)


def unlikelihood(
  logits: Array,
  tokens: Array,
  context: Array,
  context_mask: Array,
  *,
  prompt: bool = False,
  floor: Positive = 1e-5,
) -> Array:
  """-sum_{c in C} log max(1 - pi_c, floor): unlikelihood of repeated tokens (arXiv:1908.04319).

  C is the set of earlier tokens without the token itself; a token that occurred twice is in it once. The
  gradient by the logits is sum_{c in C} pi_c / (1 - pi_c) (e_c - pi), without those c whose 1 - pi_c is
  below the floor.

  Args:
    logits: f32[..., V]; carries gradient.
    tokens: i32[...], the tokens of the data.
    context: i32[..., T], the tokens before, -1 where there is none.
    context_mask: bool[..., T], which of them the loss looks at.
    prompt: whether earlier tokens outside the mask, such as those of the prompt, are in C.
    floor: least value of 1 - pi_c.

  Returns:
    f32[...], nats, >= 0.
  """
  vocabulary = logits.shape[-1]
  ids = context if prompt else jnp.where(context_mask, context, -1)
  ids = jnp.where((ids < 0) | (ids == tokens[..., None]), vocabulary, ids)
  mark = lambda row: jnp.zeros(vocabulary, bool).at[row].set(True, mode='drop')
  repeated = jax.vmap(mark)(ids.reshape(-1, ids.shape[-1])).reshape(logits.shape)
  rest = jnp.maximum(-jnp.expm1(jax.nn.log_softmax(logits, axis=-1)), floor)
  return -jnp.sum(jnp.where(repeated, jnp.log(rest), 0), axis=-1)


def _probabilities(logits: Array, tokens: Array) -> tuple[Array, Array]:
  """pi f32[..., V] and its value at the token, f32[...]; no gradient flows through them."""
  probs = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1)
  return probs, _chosen(probs, tokens)


TABLE = table(
  'logit_stats',
  logp,
  entropy,
  log_normalizer,
  token_logit,
  expected_logit,
  score_norm,
  score_fisher,
  hidden_norm,
  proxy_logp,
  log_collision,
  largest_logp,
  one_token_rollout,
  smoothed_nll,
  squared_log_normalizer,
  early_learning,
  early_learning_of_rows,
  mixed_nll,
  unlikelihood,
)
Part = Annotated[Callable, TABLE]
