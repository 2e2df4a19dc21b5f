"""Policies with so few sequences that every expectation is a finite sum.

With `V` tokens and `H` positions there are at most V^H sequences. A policy gives logits for every
prefix, from a table or from a small network. The log-probabilities of all sequences, the true
objective, its gradient and the expectation of any estimator over groups of samples are then computed
exactly, so that theorems of papers can be tested.

Letters in shapes: `S` sequences, `P` prefixes, `G` samples in a group.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.types import Array, Params

NO_STOP = -1  # a stop token that is never sampled: all sequences have full length
MAX_GROUPS = 100_000  # `expected_gradient` enumerates at most this many groups


class Policy(NamedTuple):
  """All sequences of a tiny language, and a function from parameters to the logits of all prefixes."""

  tokens: np.ndarray  # i32[S, H], 0 after a stop token
  mask: np.ndarray  # bool[S, H], False after a stop token
  prefixes: np.ndarray  # i32[S, H], the row of the logits that predicts tokens[s, t]
  init: Callable[[Array], Params]  # key -> params
  logits: Callable[[Params], Array]  # params -> f32[P, V], before normalisation


def sequences(
  vocabulary: int, horizon: int, *, stop: int = NO_STOP
) -> tuple[np.ndarray, np.ndarray]:
  """All sequences, in lexicographic order.

  Args:
    vocabulary: number of tokens, V.
    horizon: largest length, H.
    stop: the token that ends a sequence and is part of it; by default no token does.

  Returns:
    tokens: i32[S, H], 0 where the mask is False.
    mask: bool[S, H], False after the first stop token.
  """
  every = np.array(list(itertools.product(range(vocabulary), repeat=horizon)), np.int32)
  stops_before = np.cumsum(every == stop, axis=1) - (every == stop)
  mask = stops_before == 0
  # Two tuples that differ only after a stop token are the same sequence.
  tokens, first = np.unique(np.where(mask, every, -1), axis=0, return_index=True)
  return np.maximum(tokens, 0), mask[first]


def table(vocabulary: int, horizon: int, *, stop: int = NO_STOP, prompts: int = 1) -> Policy:
  """A policy with a free logit for every token after every prefix: params is f32[P, V].

  With several `prompts` each has its own logits, params is f32[prompts * P, V], and a sequence is a
  prompt with a completion: completion s of prompt x is sequence x * S + s, and the probabilities of the
  sequences of each prompt add up to 1.
  """
  tokens, mask, prefixes, contexts = _enumerate(vocabulary, horizon, stop)
  rows = prompts * len(contexts)
  prefixes = np.concatenate(
    [np.where(mask, prefixes + x * len(contexts), prefixes) for x in range(prompts)]
  )
  tokens, mask = np.tile(tokens, (prompts, 1)), np.tile(mask, (prompts, 1))
  init = lambda key: jax.random.normal(key, (rows, vocabulary))
  return Policy(tokens, mask, prefixes, init, logits=lambda params: params)


def network(vocabulary: int, horizon: int, *, hidden: int = 4, stop: int = NO_STOP) -> Policy:
  """A policy with one hidden layer on the one-hot prefix, so that prefixes share parameters."""
  tokens, mask, prefixes, contexts = _enumerate(vocabulary, horizon, stop)
  # One-hot features of every position of a prefix; the last feature marks an empty position.
  features = np.zeros((len(contexts), horizon, vocabulary + 1), np.float32)
  for row, context in enumerate(contexts):
    for t in range(horizon):
      features[row, t, context[t] if t < len(context) else vocabulary] = 1
  features = features.reshape(len(contexts), -1)

  def init(key):
    first, second = jax.random.split(key)
    return {
      'first': jax.random.normal(first, (features.shape[1], hidden)),
      'second': jax.random.normal(second, (hidden, vocabulary)),
    }

  def logits(params):
    return jnp.tanh(features @ params['first']) @ params['second']

  return Policy(tokens, mask, prefixes, init, logits)


def logp(policy: Policy, params: Params) -> Array:
  """Log-probability of every token given those before it: f32[S, H], nats, 0 outside the mask."""
  normalized = jax.nn.log_softmax(policy.logits(params))
  return jnp.where(policy.mask, normalized[policy.prefixes, policy.tokens], 0)


def objective(policy: Policy, params: Params, rewards: Array) -> Array:
  """E_{s ~ policy}[rewards[s]], exactly.

  Args:
    policy: the sequences.
    params: parameters of the policy; the gradient with respect to them is the true policy gradient.
    rewards: f32[S]. They may depend on params: log pi - log pi_ref gives the KL and its gradient.

  Returns:
    f32[].
  """
  return jnp.sum(jnp.exp(jnp.sum(logp(policy, params), axis=-1)) * rewards)


def expected_gradient(
  policy: Policy,
  params: Params,
  estimate: Callable[[Array, Array], Array],
  *,
  samples_per_prompt: int,
  behavior_params: Params,
) -> Params:
  """The exact expectation of grad estimate over groups of independent samples: a sum over S^G groups.

  Args:
    policy: the sequences.
    params: parameters of the live policy, at which the gradient is taken.
    estimate: (live logp f32[G, H], sequence indices i32[G]) -> a loss f32[]. It is vmapped.
    samples_per_prompt: G.
    behavior_params: parameters of the policy that samples; they carry no gradient.

  Returns:
    The gradient, shaped like params.

  Raises:
    ValueError: there are more than `MAX_GROUPS` groups; use `sampled_gradient` instead.
  """
  count = len(policy.tokens) ** samples_per_prompt
  if count > MAX_GROUPS:
    raise ValueError(f'{count} groups are too many to enumerate (limit {MAX_GROUPS})')
  # All groups, i32[S^G, G], and their probabilities under the sampling policy.
  groups = np.indices((len(policy.tokens),) * samples_per_prompt).reshape(samples_per_prompt, -1).T
  log_p = jnp.sum(logp(policy, behavior_params), axis=-1)
  weights = jax.lax.stop_gradient(jnp.exp(jnp.sum(log_p[groups], axis=-1)))

  def mean(params):
    return jnp.sum(weights * jax.vmap(estimate)(logp(policy, params)[groups], groups))

  return jax.jit(jax.grad(mean))(params)


def sampled_gradient(
  policy: Policy,
  params: Params,
  estimate: Callable[[Array, Array], Array],
  *,
  samples_per_prompt: int,
  behavior_params: Params,
  key: Array,
  samples: int = 1000,
) -> tuple[Params, Params]:
  """`expected_gradient` by Monte Carlo, for cases with too many groups to enumerate.

  Args:
    policy: the sequences.
    params: parameters of the live policy, at which the gradient is taken.
    estimate: as in `expected_gradient`.
    samples_per_prompt: G.
    behavior_params: parameters of the policy that samples.
    key: random key of the sampling.
    samples: number of groups to sample, default 1000.

  Returns:
    The mean gradient and its standard error, both shaped like params.
  """
  log_p = jnp.sum(logp(policy, behavior_params), axis=-1)
  groups = jax.random.categorical(key, log_p, shape=(samples, samples_per_prompt))

  @jax.jit
  def mean_and_error(params):
    one = lambda group: jax.grad(lambda p: estimate(logp(policy, p)[group], group))(params)
    gradients = jax.vmap(one)(groups)
    error = lambda g: jnp.std(g, axis=0, ddof=1) / jnp.sqrt(samples)
    return jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients), jax.tree.map(error, gradients)

  return mean_and_error(params)


def _enumerate(vocabulary: int, horizon: int, stop: int):
  """(tokens, mask, prefixes) as in `Policy`, and the list of all prefixes, one per row of the logits."""
  tokens, mask = sequences(vocabulary, horizon, stop=stop)
  rows: dict[tuple, int] = {}
  prefixes = np.zeros_like(tokens)
  for s, t in zip(*np.nonzero(mask)):
    prefixes[s, t] = rows.setdefault(tuple(tokens[s, :t].tolist()), len(rows))
  return tokens, mask, prefixes, list(rows)
