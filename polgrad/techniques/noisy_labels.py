"""Losses for labels that are noisy, or known only for bags of inputs.

Early-learning regularisation (arXiv:2007.00151) pulls predictions to their own running means, which are
mostly right before a model memorises wrong labels. Bag losses are for inputs of which only the mean
label of each bag is known.
"""

import jax
import jax.numpy as jnp

from polgrad.types import Array


def follow(targets: Array, logits: Array, ids: Array, *, decay: float = 0.7) -> Array:
  """Running means of predictions.

      t <- decay t + (1 - decay) p / sum p,   p = clip(softmax(logits), 1e-4, 1 - 1e-4)

  No gradient flows through it. Call it before `early_learning_penalty`, which reads t[ids].

  Confidence: CODE.

  >>> follow(jnp.zeros((3, 2)), jnp.zeros((1, 2)), jnp.array([2])).tolist()[2]
  [0.15000000596046448, 0.15000000596046448]

  Args:
    targets: [n, C], one row for each example of the data set, zeros at the start.
    logits: [B, C].
    ids: i32[B], the examples of the batch, each at most once.
    decay: 0.7 for CIFAR-10 and 0.9 for CIFAR-100 in the released code.
  """
  p = _clipped(jax.lax.stop_gradient(logits))
  moved = decay * targets[ids] + (1 - decay) * p / jnp.sum(p, -1, keepdims=True)
  return targets.at[ids].set(moved)


def early_learning_penalty(logits: Array, targets: Array) -> Array:
  """mean log(1 - <t, p>), which is added to the cross entropy, times 3 (CIFAR-10) or 7 (CIFAR-100).

  Its gradient by logit k of an example is -p_k (t_k - <t, p>) / (1 - <t, p>) / B where the clipping of p
  does not bind: the logits of what the model believed for long rise. It is 0 where t is 0. The
  clipping bounds it from below.

  Confidence: CODE.

  >>> round(float(early_learning_penalty(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))), 4)
  -0.6931

  Args:
    logits: [B, C].
    targets: [B, C], rows of `follow` for the batch; no gradient flows through them.
  """
  inner = jnp.sum(jax.lax.stop_gradient(targets) * _clipped(logits), -1)
  return jnp.mean(jnp.log(1 - inner))


def bag_loss(predictions: Array, means: Array, *, instance: float = 0.0) -> Array:
  """Squared errors of bags of m inputs whose mean label is known.

      L = (1 - r) mean_b (y_b - mean_i f_bi)^2 + r mean_b mean_i (y_b - f_bi)^2,   r = `instance`

  The second term is the first plus the mean variance of predictions within a bag. With r = 0 the
  estimate of a linear model is unbiased and noisy; r = 1 shrinks it, by about 1 / m where inputs are
  independent. For m = 1 all are the same.

  Confidence: PAPER.

  >>> float(bag_loss(jnp.array([[0.0, 2.0]]), jnp.ones(1)))
  0.0
  >>> float(bag_loss(jnp.array([[0.0, 2.0]]), jnp.ones(1), instance=0.5))
  0.5

  Args:
    predictions: [bags, m], f.
    means: [bags], the mean label of each bag.
    instance: r in [0, 1], to be chosen on held-out bags; `best_instance` is a beginning.

  Raises:
    ValueError: `instance` is out of range, or the shapes do not fit.
  """
  if not 0 <= instance <= 1:
    raise ValueError(f'instance is {instance}, and must lie in [0, 1]')
  if predictions.ndim != 2 or means.shape != predictions.shape[:1]:
    raise ValueError(
      f'predictions must be [bags, m] and means [bags], got {predictions.shape} and {means.shape}'
    )
  whole = jnp.mean((means - jnp.mean(predictions, 1)) ** 2)
  each = jnp.mean((means[:, None] - predictions) ** 2)
  return (1 - instance) * whole + instance * each


def best_instance(
  *, inputs: int, size: int, parameters: int, noise: float, signal: float = 1.0
) -> float:
  """The r of `bag_loss` with the least expected error of a linear model, within [0, 1].

      r = d sigma^2 / (n |theta|^2 (1 - 1/m))

  The minimiser is (S + r W)^-1 S theta plus noise, with the second moments S of bag means and W within
  bags. If W = (1 - 1/m) I, as for independent inputs of unit variance, and theta has a random direction,
  an eigenvalue b of S has the risk (c^2 |theta|^2 / d + b sigma^2 / n) / (b + c)^2, c = r (1 - 1/m). It
  is least at c = d sigma^2 / (n |theta|^2) for every b, as in ridge regression. So r falls with more
  data, and hardly depends on the size of bags.

  Confidence: DERIVED; the formula of arXiv:2401.11081 could not be read.

  >>> round(best_instance(inputs=240, size=4, parameters=8, noise=1.0), 4)
  0.0444

  Args:
    inputs: n, inputs in all bags together.
    size: m, inputs of a bag, at least 2: with one input all r are the same.
    parameters: d.
    noise: sigma, standard deviation of a single label around its mean.
    signal: |theta|, length of the parameters, for inputs of unit variance.

  Raises:
    ValueError: a size below 2, or another number that is not positive.
  """
  if size < 2:
    raise ValueError(f'size is {size}, and must be at least 2: in bags of one input r is arbitrary')
  numbers = dict(inputs=inputs, parameters=parameters, noise=noise, signal=signal)
  for name, x in numbers.items():
    if not x > 0:
      raise ValueError(f'{name} is {x}, and must be positive')
  return min(parameters * noise**2 / (inputs * signal**2 * (1 - 1 / size)), 1.0)


def _clipped(logits: Array) -> Array:
  return jnp.clip(jax.nn.softmax(logits), 1e-4, 1 - 1e-4)
