"""What an estimator of credit is, and what several of them share."""

import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp

from polgrad.losses import returns, turns
from polgrad.registry import inputs
from polgrad.types import Array, Batch

Apply = Callable[[Batch, Any], tuple[Batch, Any]]
State = dict[str, Array]


class Contrasts(NamedTuple):
  """K different advantages of a batch, and of which parameters their gradients are compared."""

  make: Callable[[Batch], Array]  # batch without credit -> f[K, B, T]
  parameters: str = ''  # regular expression that finds the names of the parameters; '' finds all


class Estimator(NamedTuple):
  """Credit assignment with its state.

  Attributes:
    apply: (batch, state) -> (batch, state). It gets a batch with mask, rewards, valid, group_ids and
      what `requires` names, and returns it with the arrays that `provides` names.
    requires: further arrays of the batch that it reads: reference_logp, proximal_logp,
      behavior_logp, old_values, teacher_logp, stream, or features of the collector.
    provides: the fields or features of the batch that it fills in. Changes to others are dropped.
    init: () -> the first state. The state is part of `TrainState` and its checkpoints.
    scored: those of `rewards` and `group_ids` that it reads; every scored batch has both.
    contrasts: advantages whose gradients it compares: it then reads `influences`, which the collector
      measures before it assigns credit (`collect.influences`). None: it compares none.
  """

  apply: Apply
  requires: frozenset[str] = frozenset()
  provides: frozenset[str] = frozenset({'advantages'})
  init: Callable[[], Any] = lambda: ()
  scored: frozenset[str] = frozenset({'rewards', 'group_ids'})
  contrasts: Contrasts | None = None


# Every estimator, filled in by the package: one that takes another one may take any.
TABLE = {}
Part = Annotated[Estimator, TABLE]


def critic(apply: Apply, requires: frozenset[str]) -> Estimator:
  """An estimator with a critic: it reads old values, and provides targets for new ones."""
  return Estimator(
    apply=apply,
    requires=requires | {'old_values'},
    provides=frozenset({'advantages', 'returns'}),
  )


def with_targets(
  batch: Batch, advantages: Array, targets: Array, normalizer: Callable[[Array, Array], Array]
) -> Batch:
  """The batch with normalised advantages, and with targets that are 0 outside the mask."""
  return batch.with_arrays(
    advantages=normalizer(advantages, batch.mask), returns=jnp.where(batch.mask, targets, 0.0)
  )


def to_tokens(per_row: Array, mask: Array) -> Array:
  """[B] -> [B, T]: each token in the mask gets the number of its row, all others 0."""
  return jnp.where(mask, per_row[:, None], 0.0)


def valid_groups(batch: Batch) -> Array:
  """Group ids in which each row that is not valid is a group by itself."""
  return jnp.where(batch.valid, batch.group_ids, -1 - jnp.arange(len(batch.valid)))


def k1(batch: Batch, other: str = 'reference_logp') -> Array:
  """The k1 estimate of KL(proximal, other) at each token, nats."""
  return jnp.where(batch.mask, batch.proximal_logp - batch[other], 0.0)


def token_rewards(batch: Batch, kl_coefficient: float = 0.0) -> Array:
  """Rewards of tokens [B, T], minus the KL penalty at every token: those of the turns, each at the last
  token of its turn, where the batch has them, else that of the row at its last token."""
  if 'turn_rewards' in batch:
    rewards = jnp.where(batch.mask, batch['turn_rewards'], 0.0)
  else:
    rewards = returns.place_last(batch.rewards, batch.mask)
  return rewards - kl_coefficient * k1(batch) if kl_coefficient else rewards


def mean_wins(
  wins: Array, valid: Array, with_itself: bool = False, *, xp: types.ModuleType = jnp
) -> Array:
  """The mean probability to beat the other valid rows of the group, [N, G]; 1/2 without others.

  Args:
    wins: [N, G, G], probability that a row beats another, 1/2 for itself.
    valid: bool[N, G].
    with_itself: whether a row's game against itself counts as well, if it is valid.
    xp: `numpy` on the host, otherwise `jax.numpy`.
  """
  others = xp.broadcast_to(valid[:, None, :], wins.shape)
  if not with_itself:
    others = others & ~xp.eye(valid.shape[1], dtype=bool)[None]
  count = others.sum(axis=2)
  total = xp.where(others, wins, 0).sum(axis=2)
  return xp.where(count > 0, total / xp.maximum(count, 1), 0.5)


def with_rewards(batch: Batch, rewards: Array) -> Batch:
  """The batch with other rewards of rows. Those of turns are left out: they add up to the old ones."""
  features = {name: x for name, x in batch.features.items() if name != 'turn_rewards'}
  return batch.replace(rewards=rewards, features=features)


def check_terms(name: str, terms: Mapping[str, float]) -> list[str]:
  """The names of the terms, sorted.

  Raises:
    ValueError: there is none; `name` is that of the estimator.
  """
  if not terms:
    raise ValueError(
      f'{name}: it needs the weights of terms of the reward, by their names; got {dict(terms)}'
    )
  return sorted(terms)


def components(batch: Batch, terms: Mapping[str, float]) -> Array:
  """The rest of the reward, and behind it the terms in alphabetical order, not weighed: f[K, B].

  Args:
    terms: weights in the reward of terms that the collector notes, by their names.
  """
  names = sorted(terms)
  found = [batch[f'{name}_term'] for name in names]
  rest = batch.rewards - sum(terms[name] * x for name, x in zip(names, found))
  return jnp.stack([rest, *found])


def averages(shape: tuple[int, ...] = ()) -> State:
  """The first state of moving averages: total = sum_k decay^k x_k and weight = sum_k decay^k."""
  return {'total': jnp.zeros(shape), 'weight': jnp.zeros(shape)}


def average(state: State) -> Array:
  """total / weight; 0 before the first x."""
  return state['total'] / jnp.maximum(state['weight'], 1e-8)


def averaged(state: State, x: Array, seen: Array, decay: float) -> State:
  """The state after another x. Where `seen` is False there is no x, and the state does not change."""
  after = {'total': decay * state['total'] + x, 'weight': decay * state['weight'] + 1.0}
  return {name: jnp.where(seen, after[name], state[name]) for name in state}


def turn_ids(batch: Batch) -> Array:
  """The number of the turn of each token in its row, i32[B, T], -1 outside the mask: `turn_ids` where
  the batch has them, else the runs of the mask."""
  if 'turn_ids' in batch:
    return jnp.where(batch.mask, batch['turn_ids'], -1)
  return turns.numbers(batch.mask)


def log_rho(batch: Batch) -> Array:
  """log of the ratio of the proximal to the sampling policy at each token, nats."""
  return batch.proximal_logp - batch.behavior_logp


def kl_requires(kl_coefficient: float) -> frozenset[str]:
  """What a penalty by `k1` reads; nothing if its coefficient is 0."""
  return frozenset({'proximal_logp', 'reference_logp'} if kl_coefficient else ())


def named(fn: Callable) -> frozenset[str]:
  """What a function reads beyond what every scored batch has."""
  return frozenset(inputs(fn)) - {'mask', 'rewards', 'valid', 'group_ids'}
