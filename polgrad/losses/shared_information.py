"""What two samples of one policy have in common: the representation loss of RLP (arXiv:2403.19279).

Two completions v1 and v2 of one prompt are two views of it. An encoder maps each to a Gaussian q1 or q2,
from which a code z1 or z2 is drawn. The loss rewards codes that are informative of each other, and
penalises what only one of them holds:

    loss = mean over prompts of symmetric_kl(q1, q2) - jensen_shannon(T)

T is the matrix of a critic's scores T(z1 of prompt i, z2 of prompt j). The encoder reads the features of
a reward model, and the loss is added to the Bradley-Terry loss, in the paper with the coefficient 1/2.
These are pure functions; no method of polgrad trains them.

The examples need `import jax.numpy as jnp, numpy as np` and
`from polgrad.losses import shared_information`.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array


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


def jensen_shannon(critic: Array) -> Array:
  """The Jensen-Shannon lower bound of the information between the codes, from [N, N] to [].

      mean over i of -softplus(-T_ii) - mean over i != j of softplus(T_ij)

  It is -2 log 2 for a critic that knows nothing (T = 0), and below 0 for every critic.

  Args:
    critic: T_ij, the critic's score of the codes z1 of prompt i and z2 of prompt j.

  >>> print(shared_information.jensen_shannon(jnp.zeros((3, 3))).round(4))
  -1.3863
  """
  chex.assert_rank(critic, 2)
  own = jnp.eye(len(critic), dtype=bool)
  others = jnp.sum(jnp.where(own, 0, jax.nn.softplus(critic)))
  count = len(critic) * (len(critic) - 1)
  return -jnp.mean(jax.nn.softplus(-jnp.diagonal(critic))) - others / max(count, 1)


def confident_pair(
  clusters: Sequence[int], scores: Sequence[float], draw: float, *, confidence: float = 0.5
) -> tuple[int, int] | None:
  """A synthetic preference among the samples of a prompt, or None (RLP-SPG).

  If the largest cluster of equivalent samples has at least the fraction `confidence` of all samples, its
  member with the best score is preferred to a random sample of the other clusters.

  Args:
    clusters: number of the cluster of each sample. Of equally large clusters the first is taken.
    scores: of the samples, by a reward model.
    draw: uniform random number in [0, 1), which chooses the other sample.
    confidence: gamma in the paper.

  Returns:
    (preferred, other), indices of samples; None if no cluster is large enough, or all are equivalent.

  >>> shared_information.confident_pair([0, 0, 1, 0], [0.1, 0.9, 2.0, 0.3], draw=0.5)
  (1, 2)
  """
  sizes = {name: list(clusters).count(name) for name in dict.fromkeys(clusters)}
  if not sizes:
    return None
  largest = max(sizes, key=sizes.get)
  inside = [i for i, name in enumerate(clusters) if name == largest]
  outside = [i for i, name in enumerate(clusters) if name != largest]
  if len(inside) < confidence * len(clusters) or not outside:
    return None
  return max(inside, key=lambda i: scores[i]), outside[int(draw * len(outside))]
