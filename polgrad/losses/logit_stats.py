"""Statistics of the next-token distribution: what needs the logits, one number a token.

They are evaluated in chunks (see `models/token_stats.py`), so [B, T, V] is never held. `logits`
[..., V], `tokens` i32[...] and `hidden` [..., D] are told by name.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import table
from polgrad.types import Array


def logp(logits: Array, tokens: Array) -> Array:
  """Log-probability of the tokens, log softmax(logits)[tokens]; f32[..., V], i32[...] -> f32[...]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Array) -> Array:
  """Entropy in nats, -sum_v p_v log p_v; f32[..., V] -> f32[...]. Logits may be -inf."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, log_probs, 0), axis=-1)


def log_normalizer(logits: Array) -> Array:
  """logsumexp(logits), the state value of logits read as Q (arXiv:2505.15311); f32[..., V] ->
  f32[...]."""
  return jax.nn.logsumexp(logits, axis=-1)


def score_norm(logits: Array, tokens: Array) -> Array:
  """|v|^2 of the score in the logits, v = e_token - pi: 1 - 2 pi_token + sum pi^2.

  Data: the weight of optimal baselines (arXiv:2602.07078) and the curvature of a token's update.

  Args:
    logits: f32[..., V].
    tokens: i32[...].

  Returns:
    f32[...], in [0, 2].
  """
  probs, chosen = _probabilities(logits, tokens)
  return 1 - 2 * chosen + jnp.sum(jnp.square(probs), axis=-1)


def score_fisher(logits: Array, tokens: Array) -> Array:
  """v' F v with v = e_token - pi and the Fisher matrix F = diag pi - pi pi' of the logits.

  Data. The ratio pi / pi_old has the Hessian v v' - F where both agree, so along v its curvature is
  `score_norm`^2 - `score_fisher`: CAPO (arXiv:2510.00819).

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
  """|h|^2 of the hidden state that scores the token: next to `score_norm` the squared gradient norm
  of the last layer; f32[..., D] -> f32[...]. Data."""
  return jnp.sum(jnp.square(jax.lax.stop_gradient(hidden)), axis=-1)


def proxy_logp(logits: Array, tokens: Array, *, kappa: float = 0.02) -> Array:
  """Log-probability under the distribution without its tail: Lp-Reg (arXiv:2510.03222).

  Tokens with pi < kappa max pi are left out and the others normalised again. Data.

  Args:
    logits: f32[..., V].
    tokens: i32[...].
    kappa: the smallest share of the largest probability that stays.

  Returns:
    f32[...], nats; about -1e4 for a token that was left out.
  """
  logits = jax.lax.stop_gradient(logits)
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  return logp(jnp.where(logits >= jnp.log(kappa), logits, -1e4), tokens)


def one_token_rollout(
  logits: Array, tokens: Array, *, beta: float = -0.1, temperature: float = 1.3
) -> Array:
  """-sum_a sg(q_a R_a) log pi_a, R_a = 1 for the token of the data and beta for every other, q =
  softmax(logits / temperature): OTR (arXiv:2509.26313).

  REINFORCE on one token drawn from q in the place of supervised learning, here as the expectation
  over q instead of samples. At temperature 1 it is pi_token (1 - beta) times the gradient of
  supervised learning.

  Args:
    logits: f32[..., V], with their gradient.
    tokens: i32[...].
    beta: the reward of a token that is not the data's.
    temperature: of the sampling distribution.

  Returns:
    f32[...], a loss.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  log_probs = jnp.where(log_probs > -jnp.inf, log_probs, 0)
  sampler = jax.lax.stop_gradient(jax.nn.softmax(logits / temperature, axis=-1))
  rewards = beta + (1 - beta) * jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)
  return -jnp.sum(sampler * rewards * log_probs, axis=-1)


def _probabilities(logits: Array, tokens: Array) -> tuple[Array, Array]:
  """All probabilities and the token's, as data: f32[..., V], i32[...] -> f32[..., V], f32[...]."""
  probs = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1)
  return probs, jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]


TABLE = table(
  'logit_stats',
  logp,
  entropy,
  log_normalizer,
  score_norm,
  score_fisher,
  hidden_norm,
  proxy_logp,
  one_token_rollout,
)
Part = Annotated[Callable, TABLE]
