"""What two samples of one policy have in common: the representation loss of RLP (arXiv:2403.19279).

Two completions v1 and v2 of one prompt are two views of it. An encoder maps each to a Gaussian q1 or q2,
from which a code z1 or z2 is drawn. The loss rewards codes that are informative of each other, and
penalises what only one of them holds:

    loss = mean over prompts of symmetric_kl(q1, q2) - jensen_shannon(T)

T is the matrix of a critic's scores T(z1 of prompt i, z2 of prompt j). The encoder reads the features of
a reward model, and the loss is added to the Bradley-Terry loss, in the paper with the coefficient 1/2.
`methods.rlp_uml` trains it.

The examples need `import jax.numpy as jnp, numpy as np` and
`from polgrad.losses import shared_information`.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.losses._layers import layers, mlp
from polgrad.types import Array, Params


def init(key: Array, *, width: int, code: int, hidden: int = 512) -> Params:
  """Random parameters of the encoder and of the critic, as `encode` and `critic` read them.

  The paper says that the heads have three layers; their widths and the critic are our choice.

  Args:
    key: of the random numbers.
    width: size of the features of a completion.
    code: size of the code z.
    hidden: size of the hidden layers.

  Returns:
    {'mean': ..., 'log_std': ..., 'critic': ...}, nested dicts of float32 arrays.
  """
  mean, log_std, critic = jax.random.split(key, 3)
  return {
    'mean': layers(mean, width, hidden, hidden, code),
    'log_std': layers(log_std, width, hidden, hidden, code),
    'critic': layers(critic, 2 * code, hidden, hidden, 1),
  }


def encode(params: Params, features: Array) -> tuple[Array, Array]:
  """Mean and standard deviation of the codes, [..., width] -> two of [..., code].

  The logarithm of the standard deviation is clipped to [-5, 2].
  """
  return mlp(params['mean'], features), jnp.exp(jnp.clip(mlp(params['log_std'], features), -5, 2))


def critic(params: Params, first: Array, second: Array) -> Array:
  """T_ij of codes of n prompts, [..., n, code] twice -> [..., n, n]: an MLP of both codes."""
  n = first.shape[-2]
  rows = jnp.repeat(first[..., :, None, :], n, axis=-2)
  columns = jnp.repeat(second[..., None, :, :], n, axis=-3)
  return mlp(params['critic'], jnp.concatenate([rows, columns], axis=-1))[..., 0]


def gaussian_kl(mean: Array, std: Array, other_mean: Array, other_std: Array) -> Array:
  """KL(q || p) of Gaussians with diagonal covariances, [..., L] -> [...], nats.

  sum(log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2), where q has m1, s1 and p has m2, s2.
  """
  chex.assert_equal_shape([mean, std, other_mean, other_std])
  moved = (jnp.square(std) + jnp.square(mean - other_mean)) / (2 * jnp.square(other_std))
  return jnp.sum(jnp.log(other_std) - jnp.log(std) + moved - 0.5, axis=-1)


def symmetric_kl(mean: Array, std: Array, other_mean: Array, other_std: Array) -> Array:
  """(KL(q || p) + KL(p || q)) / 2, [..., L] -> [...], nats; 0 exactly where both are equal.

  >>> one = jnp.array([1.0, 2.0])
  >>> print(shared_information.symmetric_kl(one, one, one, one))
  0.0
  """
  q, p = (mean, std), (other_mean, other_std)
  return 0.5 * (gaussian_kl(*q, *p) + gaussian_kl(*p, *q))


def jensen_shannon(critic: Array, where: Array | None = None) -> Array:
  """The Jensen-Shannon bound of the information between the codes, by prompt: [..., n, n] -> [..., n].

      -softplus(-T_ii) - mean over j != i of softplus(T_ij)

  The bound is the mean over the prompts i. It is -2 log 2 for a critic that knows nothing (T = 0), and
  below 0 for every critic.

  Args:
    critic: T_ij, the critic's score of the codes z1 of prompt i and z2 of prompt j.
    where: bool[..., n], the prompts that there are; None: all. Others are not among the j.

  >>> print(np.asarray(shared_information.jensen_shannon(jnp.zeros((3, 3)))).round(4))
  [-1.3863 -1.3863 -1.3863]
  """
  n = critic.shape[-1]
  there = jnp.ones(critic.shape[:-1], bool) if where is None else where
  others = there[..., None, :] & jnp.broadcast_to(~jnp.eye(n, dtype=bool), critic.shape)
  total = jnp.sum(jnp.where(others, jax.nn.softplus(critic), 0), axis=-1)
  own = jnp.diagonal(critic, axis1=-2, axis2=-1)
  return -jax.nn.softplus(-own) - total / jnp.maximum(jnp.sum(others, axis=-1), 1)
