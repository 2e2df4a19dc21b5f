"""Credit: from a scored rollout to the advantages, returns or labels that an objective reads.

An `Estimator` lifts the pure functions of `losses` to a whole rollout. It runs once a rollout,
before minibatches are cut, so group and batch statistics are always those of the whole rollout.
What it returns is data: no gradient flows through it."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from polgrad.losses import advantages as advantage_functions
from polgrad.losses import returns
from polgrad.losses.advantages import NormalizerPart, group_mean, identity, whiten
from polgrad.registry import table
from polgrad.types import Array

Arrays = dict[str, Array]


class Estimator(NamedTuple):
  """Credit assignment with its state.

  Attributes:
    apply: (arrays, state) -> (fields, state). `arrays` holds mask, rewards, valid, group_ids and
      what `requires` names; `fields` are the `Batch` fields named by `provides`.
    requires: extra arrays [B, T]: reference_logp, proximal_logp, old_values or teacher_logp.
    provides: names of the returned fields.
    init: () -> state, carried in `TrainState` and its checkpoints.
  """

  apply: Callable[[Arrays, Any], tuple[Arrays, Any]]
  requires: frozenset[str] = frozenset()
  provides: frozenset[str] = frozenset({'advantages'})
  init: Callable[[], Any] = lambda: ()


def nothing() -> Estimator:
  """No credit: for objectives that read only the data (supervised, distillation)."""
  return Estimator(apply=lambda x, state: ({}, state), provides=frozenset())


def outcome(
  *,
  advantage: advantage_functions.Part = group_mean,
  normalizer: NormalizerPart = identity,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """One advantage a sequence, given to each of its tokens.

  A = advantage(R - kl_coefficient * sum_t k1_t), k1 = proximal_logp - reference_logp: a KL penalty in
  the reward has the gradient of KL(policy, reference) (arXiv:2402.14740).
  """

  def apply(x, state):
    rewards = x['rewards']
    if kl_coefficient:
      rewards = rewards - kl_coefficient * jnp.sum(_k1(x), axis=1)
    per_row = advantage(rewards, x['group_ids'], x['valid'])
    tokens = jnp.where(x['mask'], per_row[:, None], 0.0)
    return {'advantages': normalizer(tokens, x['mask'])}, state

  return Estimator(apply=apply, requires=_kl_requires(kl_coefficient))


def generalized(
  *,
  discount: float = 1.0,
  trace: float = 0.95,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """Generalised advantage estimation (arXiv:1506.02438) against a learned value.

  The reward stands on the last policy token, the KL penalty on every token. Returns are taken
  before the advantages are normalised.
  """

  def apply(x, state):
    rewards = returns.place_last(x['rewards'], x['mask'])
    if kl_coefficient:
      rewards = rewards - kl_coefficient * _k1(x)
    values = jnp.where(x['mask'], x['old_values'], 0.0)
    advantages = returns.gae(rewards, values, x['mask'], discount=discount, trace=trace)
    targets = jnp.where(x['mask'], advantages + values, 0.0)
    return {'advantages': normalizer(advantages, x['mask']), 'returns': targets}, state

  return Estimator(
    apply=apply,
    requires=_kl_requires(kl_coefficient) | {'old_values'},
    provides=frozenset({'advantages', 'returns'}),
  )


def moving_baseline(*, decay: float = 0.9) -> Estimator:
  """A = R - b with b a moving average of the mean rewards of earlier rollouts.

  b does not depend on the rollout that it is taken from, so the estimate of the policy gradient is
  exactly unbiased (Williams 1992). State: the average and its weight (for the first rollouts,
  sum_k decay^k r / sum_k decay^k).
  """

  def apply(x, state):
    baseline = state['total'] / jnp.maximum(state['weight'], 1e-8)
    per_row = jnp.where(x['valid'], x['rewards'] - baseline, 0.0)
    rows = jnp.sum(x['valid'])
    mean = jnp.sum(jnp.where(x['valid'], x['rewards'], 0.0)) / jnp.maximum(rows, 1)
    seen = (rows > 0).astype(jnp.float32)
    state = {
      'total': jnp.where(seen, decay * state['total'] + mean, state['total']),
      'weight': jnp.where(seen, decay * state['weight'] + 1.0, state['weight']),
    }
    return {'advantages': jnp.where(x['mask'], per_row[:, None], 0.0)}, state

  return Estimator(apply=apply, init=lambda: {'total': jnp.zeros(()), 'weight': jnp.zeros(())})


def teacher_log_ratio(*, clip: float = 10.0) -> Estimator:
  """A_t = clip(teacher_logp - proximal_logp, -clip, clip): sampled reverse-KL distillation.

  Its expectation on the student's samples is minus the gradient of the token-level reverse KL
  (arXiv:2306.13649). Rewards are not read.
  """

  def apply(x, state):
    gap = jnp.where(x['mask'], x['teacher_logp'] - x['proximal_logp'], 0.0)
    return {'advantages': jnp.clip(gap, -clip, clip)}, state

  return Estimator(apply=apply, requires=frozenset({'teacher_logp', 'proximal_logp'}))


def preference() -> Estimator:
  """Labels for groups of two: 1 where the row's reward is the larger of its pair (arXiv:2402.04792).

  A tie, or a pair with a failed verifier, is masked out of loss and count.
  """

  def apply(x, state):
    rewards = x['rewards'].reshape(-1, 2)
    usable = x['valid'].reshape(-1, 2).all(axis=1) & (rewards[:, 0] != rewards[:, 1])
    better = rewards > rewards[:, ::-1]
    mask = x['mask'] & jnp.repeat(usable, 2)[:, None]
    return {'label': better.astype(jnp.float32).reshape(-1), 'mask': mask}, state

  return Estimator(apply=apply, provides=frozenset({'label', 'mask'}))


def _k1(x: Arrays) -> Array:
  return jnp.where(x['mask'], x['proximal_logp'] - x['reference_logp'], 0.0)


def _kl_requires(kl_coefficient: float) -> frozenset[str]:
  return frozenset({'proximal_logp', 'reference_logp'} if kl_coefficient else ())


TABLE = table(nothing, outcome, generalized, moving_baseline, teacher_log_ratio, preference)
Part = Annotated[Estimator, TABLE]


def assign(estimator: Estimator, arrays: Arrays, state: Any) -> tuple[Arrays, Any]:
  """Runs an estimator; rows without a valid reward leave the loss through the mask."""
  arrays = arrays | {'mask': arrays['mask'] & arrays['valid'][:, None]}
  fields, state = estimator.apply(arrays, state)
  return jax.lax.stop_gradient({'mask': arrays['mask'], **fields}), state
