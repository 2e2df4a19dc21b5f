"""Rewards and credit of smaller networks that a policy proposes, as in N2N (arXiv:1709.06030).

The policy keeps or removes layers, or shrinks them, and a student of the proposed shape is trained on
the teacher's logits. How well it does, and how small it is, is the reward.
"""

import chex
import jax
import jax.numpy as jnp

from polgrad.types import Array

# Factors of the size of a layer, of which a shrinking policy takes one; 0.5 is there more often.
FACTORS = (0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def reward(
  accuracy: Array,
  teacher_accuracy: Array,
  parameters: Array,
  teacher_parameters: Array,
  valid: Array | bool = True,
) -> Array:
  """(accuracy / teacher accuracy) C (2 - C), C = 1 - parameters / teacher parameters.

  A student as large as the teacher gets 0.

  Args:
    accuracy: [...], of the students, on held-out examples.
    teacher_accuracy: [], above 0.
    parameters: [...], their number in the students.
    teacher_parameters: [].
    valid: bool[...]; students that cannot be built get -1.

  Confidence: CODE.

  >>> print(reward(jnp.array(0.81), 0.9, 400, 1000).round(4))
  0.756
  """
  smaller = 1 - parameters / teacher_parameters
  return jnp.where(valid, accuracy / teacher_accuracy * smaller * (2 - smaller), -1.0)


def constrained(reward: Array, satisfied: Array, epoch: Array) -> Array:
  """The reward where a constraint is satisfied, else (eps - 1) + eps reward.

  eps = max(0, 1 - epoch / 15)^4. Violations cost nothing at first, and are as bad as students that
  cannot be built after 15 epochs.

  >>> print(constrained(jnp.array(0.756), False, 3).round(4))
  -0.2807
  """
  eps = jnp.maximum(0.0, 1 - epoch / 15) ** 4
  return jnp.where(satisfied, reward, eps - 1 + eps * reward)


def keep_or_remove(logits: Array, actions: Array, free: Array) -> Array:
  """Log-probability of a network: each free layer is kept (1) with sigmoid(logit): [..., L] -> [...].

  Args:
    logits: [L], of the policy.
    actions: i32[..., L], 1 to keep and 0 to remove.
    free: bool[L]; the others are always kept, and have no probability.
  """
  logits, free = (jnp.broadcast_to(x, actions.shape) for x in (logits, free))
  sign = 2 * actions - 1
  return jnp.sum(jnp.where(free, jax.nn.log_sigmoid(sign * logits), 0), axis=-1)


def credit(
  rewards: Array, total: Array, epoch: Array, *, released: bool = False
) -> tuple[Array, Array]:
  """Advantages of the rollouts of an epoch, R_i - b, b the mean reward of earlier epochs.

  Differences: the released code (`released=True`) gives all rollouts the mean of R - b, and divides
  the sum of the e earlier means by e + 1, so b is too low.

  Args:
    rewards: [B], of this epoch's rollouts.
    total: [], sum of the mean rewards of earlier epochs, 0 at first.
    epoch: [], number of earlier epochs.
    released: see above.

  Returns:
    [B] and the new total.
  """
  chex.assert_rank(rewards, 1)
  baseline = total / (epoch + 1 if released else jnp.maximum(epoch, 1))
  mean = jnp.mean(rewards)
  values = jnp.broadcast_to(mean, rewards.shape) if released else rewards
  return values - baseline, total + mean


def student_loss(logits: Array, teacher_logits: Array) -> Array:
  """Mean squared difference of logits: the loss of a student: [B, K] -> [].

  Students were trained for 5 epochs by SGD with 5e-4, Nesterov momentum 0.9 and weight decay 5e-4.
  """
  chex.assert_equal_shape([logits, teacher_logits])
  return jnp.mean((logits - jax.lax.stop_gradient(teacher_logits)) ** 2)
