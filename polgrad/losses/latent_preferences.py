"""Preferences of a user who is a latent variable: variational preference learning (arXiv:2408.10075).

What is known of a user are labelled pairs of completions, the context. An encoder maps the context to a
Gaussian over a latent variable z, and the reward r(y, z) of a completion y is a function of its
embedding and of z. With a query pair of the same user, the negative evidence lower bound is

    softplus(-(r(chosen, z) - r(rejected, z))) + weight KL(q(z | context) || N(0, I)),  z ~ q

Without the latent, users with opposite tastes cancel: the best Bradley-Terry reward is then constant.
These are pure functions of embeddings, such as a reward model's state at the last token.
`methods.vpl` trains them.

The examples need `import jax, jax.numpy as jnp, numpy as np` and
`from polgrad.losses import latent_preferences`.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._layers import layer, layers, linear, mlp
from polgrad.types import Array, Params


class Posterior(NamedTuple):
  """A Gaussian with a diagonal covariance over the latent of each user."""

  mean: Array  # [..., L]
  log_variance: Array  # [..., L]


def init(
  key: Array, *, width: int, latent: int, hidden: int = 512, attention: bool = True
) -> Params:
  """Random parameters of the encoder and of the reward, as `encode` and `reward` read them.

  Args:
    key: of the random numbers.
    width: size of an embedding.
    latent: size of the latent.
    hidden: size of the hidden layers.
    attention: whether pairs of the context attend to each other.

  Returns:
    {'encoder': ..., 'decoder': ...}, nested dicts of float32 arrays.
  """
  keys = jax.random.split(key, 5)
  encoder = {
    'pair': layers(keys[0], 2 * width, hidden, hidden, latent),
    'mean': layer(keys[1], latent, latent),
    'log_variance': layer(keys[2], latent, latent),
  }
  if attention:
    each = zip(('query', 'key', 'value'), jax.random.split(keys[3], 3))
    encoder['attention'] = {name: layer(one, latent, latent) for name, one in each}
  return {'encoder': encoder, 'decoder': layers(keys[4], width + latent, hidden, hidden, 1)}


def encode(params: Params, chosen: Array, rejected: Array, where: Array | None = None) -> Posterior:
  """The posterior of a user's latent, given labelled pairs; the order of the pairs does not matter.

  Each pair goes through an MLP, the codes of all pairs through one head of self-attention (if `params`
  has it), and their mean through two linear maps, whose results are clipped to [-1, 1].

  Args:
    params: of `init`.
    chosen, rejected: [..., N, width], embeddings of the N pairs of a user.
    where: bool[..., N], the pairs that there are, at least one; None: all.
  """
  chex.assert_equal_shape([chosen, rejected])
  encoder = params['encoder']
  codes = mlp(encoder['pair'], jnp.concatenate([chosen, rejected], axis=-1))
  there = jnp.ones(codes.shape[:-1], bool) if where is None else where
  if 'attention' in encoder:
    query, keys, values = (
      linear(encoder['attention'][name], codes) for name in ('query', 'key', 'value')
    )
    looks = query @ jnp.swapaxes(keys, -1, -2) / query.shape[-1] ** 0.5
    codes = jax.nn.softmax(jnp.where(there[..., None, :], looks, -1e30)) @ values
  count = jnp.maximum(jnp.sum(there, axis=-1, keepdims=True), 1)
  pooled = jnp.sum(jnp.where(there[..., None], codes, 0), axis=-2) / count
  read = lambda name: jnp.clip(linear(encoder[name], pooled), -1, 1)
  return Posterior(read('mean'), read('log_variance'))


def sample(posterior: Posterior, noise: Array, *, normalize: bool = True) -> Array:
  """z = mean + std * noise, [..., L]; with `normalize`, scaled to the length sqrt(L).

  Training draws `noise` from N(0, I), and evaluation takes 0. The authors' code does not normalise in
  evaluation, so that the reward sees latents of another length than in training; here both are treated
  alike.
  """
  z = posterior.mean + jnp.exp(0.5 * posterior.log_variance) * noise
  if not normalize:
    return z
  length = jnp.sqrt(jnp.sum(jnp.square(z), axis=-1, keepdims=True) + 1e-12)
  return z / length * z.shape[-1] ** 0.5


def reward(params: Params, embedding: Array, z: Array) -> Array:
  """r(y, z) of completions, [...]: an MLP of the embedding [..., width] beside the latent [..., L]."""
  return mlp(params['decoder'], jnp.concatenate([embedding, z], axis=-1))[..., 0]


def prior_kl(posterior: Posterior) -> Array:
  """KL(q || N(0, I)) = 1/2 sum(exp(lv) + m^2 - 1 - lv), [...], nats.

  >>> at_prior = latent_preferences.Posterior(jnp.zeros(3), jnp.zeros(3))
  >>> moved = latent_preferences.Posterior(jnp.ones(2), jnp.zeros(2))
  >>> print(float(latent_preferences.prior_kl(at_prior)), float(latent_preferences.prior_kl(moved)))
  0.0 1.0
  """
  mean, log_variance = posterior
  inside = jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance
  return 0.5 * jnp.sum(inside, axis=-1)


def negative_evidence_bound(
  params: Params,
  context: tuple[Array, Array],
  query: tuple[Array, Array],
  noise: Array,
  *,
  weight: float = 1e-4,
  normalize: bool = True,
) -> Array:
  """The loss of each user, [...]: the formula at the top of this module.

  Args:
    params: of `init`.
    context: embeddings [..., N, width] of the chosen and the rejected completions that are known.
    query: embeddings [..., width] of a chosen and a rejected completion of the same user.
    noise: [..., L], standard normal.
    weight: of the KL. With a weight near 1 the posterior collapses to the prior, and z carries no
      information.
    normalize: see `sample`.
  """
  posterior = encode(params, *context)
  z = sample(posterior, noise, normalize=normalize)
  chosen, rejected = (reward(params, one, z) for one in query)
  return jax.nn.softplus(rejected - chosen) + weight * prior_kl(posterior)


def win_rates(rewards: Array) -> Array:
  """mean over y' of sigmoid(r(y, z) - r(y', z)), [..., N] -> [..., N].

  The scale of r differs between users, so their rewards are compared by how often a completion wins
  against the others.
  """
  return jax.nn.sigmoid(rewards[..., :, None] - rewards[..., None, :]).mean(axis=-1)
