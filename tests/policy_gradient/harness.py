"""Batches on which the loss of a method meets its weight, -dloss/dlogp, written in NumPy."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import methods, objectives
from polgrad.objectives.base import Objective
from polgrad.registry import bind
from polgrad.types import Batch, Outputs
from tests.runs import method_of

NAMES = list(methods.FAMILIES['policy_gradient'])
# One method of each objective; the others with the same one differ outside of it.
DISTINCT = list({method_of(n).objective.to_json_best_effort(): n for n in NAMES[::-1]}.values())[
  ::-1
]
TOKENS = ('behavior_logp', 'proximal_logp', 'reference_logp', 'teacher_logp', 'advantages',
          'returns', 'old_values')  # fmt: skip
LIVE = ('logp', 'entropy', 'values')


def objective_of(name: str, **overrides) -> Objective:
  """The objective of an experiment; overrides by dotted path, `a__b=1` for a.b."""
  spec = method_of(name).objective
  for path, value in overrides.items():
    *parents, last = path.split('__')
    node = spec
    for parent in parents:
      node = node[parent]
    assert last in node, f'{path}: there is {sorted(node)}'
    with node.unlocked():
      node[last] = value
  return bind(spec, objectives.TABLE)


def random_arrays(objective: Objective, *, group: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
  """Two groups of four rows (or four of two) of six tokens in float64; masks with holes; row 4 is empty.

  Everything that a loss may read by name: tokens [B, T], rows [B], and statistics of the logits as
  arrays of their own.
  """
  rng = np.random.default_rng(seed)
  rows, length = 8, 6
  shape = (rows, length)
  mask = rng.uniform(size=shape) < 0.75
  mask[:, 2] = True
  mask[4] = False
  old = -1.5 + 0.3 * rng.normal(size=shape)
  x = {name: old + 0.3 * rng.normal(size=shape) for name in ('logp', *TOKENS[:4], 'previous_logp')}
  x |= {
    'mask': mask,
    'advantages': np.repeat(rng.normal(size=(rows, 1)), length, axis=1),
    'returns': rng.normal(size=shape),
    'old_values': rng.normal(size=shape),
    'values': rng.normal(size=shape),
    'entropy': rng.uniform(0.5, 1.5, size=shape),
    'proxy_logp': old + 0.3 * rng.normal(size=shape),
    'rewards': rng.integers(0, 2, rows) + 0.3 * rng.normal(size=rows),
    'label': rng.uniform(size=rows),
    'group_ids': np.repeat(np.arange(rows // group), group),
    'stream': np.tile([0, 1, 1, 1], rows)[:rows],
    'staleness': rng.integers(0, 5, rows).astype(float),
    'success_rate': np.repeat(rng.uniform(0.2, 0.8, rows // group), group),
    'baseline_rewards': np.repeat(rng.normal(size=(rows // group, 3)), group, axis=0),
    'uniform': rng.uniform(size=rows),
    'score_norm': rng.uniform(0, 2, size=shape),
    'global_advantages': np.repeat(rng.normal(size=(rows, 1)), length, axis=1),
    'local_weight': rng.uniform(size=rows),
    'replay_weight': rng.uniform(0.2, 1.0, rows),
    'score_fisher': rng.uniform(0, 0.5, size=shape),
    'hidden_norm': rng.uniform(0, 2000, size=shape),
  }
  x |= {name: rng.uniform(0.1, 1.0, size=shape) for name in objective.stats}
  x['injected'] = np.random.default_rng(seed).uniform(size=shape) < 0.5
  if isinstance(objective, objectives.WeightedSum) and 'stream' not in objective.requires:
    del x['stream']  # all of its objectives see all rows
  return {
    k: np.where(mask, v, 0.0) if k != 'mask' and np.shape(v) == shape else v for k, v in x.items()
  }


def fix_a(objective: Objective) -> dict[str, np.ndarray]:
  """The fixture of the weight table: two rows of three tokens, in one group."""
  old = np.array([[-1.0, -0.5, -2.0], [-0.2, -1.5, -3.0]])
  mask = np.array([[True, True, True], [True, True, False]])
  rewards = np.array([1.0, -0.5])
  x = {
    'mask': mask,
    'logp': old + np.array([[0.1, 0.6, -0.2], [-0.5, 0.3, 0.0]]),
    'proximal_logp': old,
    'reference_logp': old + np.array([[0.05, -0.1, 0.2], [0, 0.1, 0]]),
    'behavior_logp': old + np.array([[0, -0.9, 0.1], [0.2, 0, 0]]),
    'advantages': np.repeat(rewards[:, None], 3, axis=1),
    'rewards': rewards,
    'group_ids': np.zeros(2, int),
    'success_rate': np.full(2, 0.5),
    'global_advantages': np.repeat(rewards[:, None], 3, axis=1),
    'local_weight': np.full(2, 0.5),
    'replay_weight': np.array([1.0, 0.4]),
    'staleness': np.full(2, 2.0),
    'entropy': np.ones((2, 3)),
    'values': np.zeros((2, 3)),
    'injected': np.zeros((2, 3)),
  }
  x |= {name: np.zeros((2, 3)) for name in objective.stats}
  return {
    k: np.where(mask, v, 0.0) if k != 'mask' and np.shape(v) == mask.shape else v
    for k, v in x.items()
  }


def batch_of(x: dict) -> Batch:
  """A batch with these arrays; what no field has room for is a feature."""
  mask = x['mask']
  batch = Batch(tokens=np.zeros(mask.shape, np.int32), segment_ids=mask.astype(np.int32), mask=mask)
  return batch.with_arrays(**x)


def scored(*, rewards, length: int = 1, **arrays) -> Batch:
  """Valid rows of `length` tokens, in one group unless told otherwise, with these arrays."""
  rows = len(rewards)
  x = {
    'mask': jnp.ones((rows, length), bool),
    'valid': jnp.ones(rows, bool),
    'group_ids': jnp.zeros(rows, jnp.int32),
    'rewards': rewards,
  }
  return batch_of(x | arrays)


def terms_of(objective: Objective, outputs: Outputs, batch: Batch, *, step: int) -> dict:
  """The terms of a loss by name, without the metrics beside it, which take as long.

  `methods_test` and `objectives_test` compute those.
  """
  with mock.patch.object(objectives.PolicyGradient, 'policy_metrics', lambda *_: {}):
    return objective.apply(outputs, batch, objective.init(), step=step)[0]


def loss_and_weight(
  objective: Objective, x: dict[str, np.ndarray], *, step: int = 3, with_probes: bool = False
):
  """The loss, and minus its gradient by logp, entropy, values and every statistic.

  Probes are added to the loss if `with_probes` is True.
  """
  unread = {*LIVE, *objective.stats} | {'stream'} - objective.requires
  batch = batch_of({k: jnp.asarray(v) for k, v in x.items() if k not in unread})
  leaves = {k: jnp.asarray(x[k]) for k in (*LIVE, *objective.stats) if k in x}

  def loss(leaves):
    outputs = Outputs(
      **{k: leaves.get(k) for k in LIVE}, stats={k: leaves[k] for k in objective.stats}
    )
    terms = terms_of(objective, outputs, batch, step=step)
    return sum(t.value() for k, t in terms.items() if with_probes or k not in objective.probes)

  value, gradient = jax.value_and_grad(loss)(leaves)
  return np.asarray(value), {k: -np.asarray(v) for k, v in gradient.items()}


# Aggregations of the weights, in NumPy: token losses to what a token's gradient is multiplied with.


def token_mean(w, mask):
  return np.where(mask, w, 0) / mask.sum()


def sequence_mean(w, mask, empty_rows=False):
  rows = (mask.any(axis=1) | empty_rows).sum()
  return np.where(mask, w, 0) / np.maximum(mask.sum(axis=1, keepdims=True), 1) / rows


def sequence_sum(w, mask, empty_rows=False):
  return np.where(mask, w, 0) / (mask.any(axis=1) | empty_rows).sum()


def constant_length(w, mask, length):
  return np.where(mask, w, 0) / (len(mask) * length)


def ppo(x, ratio, low, high):
  """r A where the trust region keeps the token: A >= 0 and r <= high, or A <= 0 and r >= low."""
  a = x['advantages']
  return np.where(a >= 0, ratio <= high, ratio >= low) * ratio * a


def ratio_of(x, other: str = 'proximal_logp'):
  return np.exp(x['logp'] - x[other])


def row_mean(v, mask):
  """The mean over a row's tokens, at each of them."""
  n = np.maximum(mask.sum(axis=1, keepdims=True), 1)
  return np.broadcast_to(np.where(mask, v, 0).sum(axis=1, keepdims=True) / n, mask.shape)


def row_sum(v, mask):
  return np.broadcast_to(np.where(mask, v, 0).sum(axis=1, keepdims=True), mask.shape)
