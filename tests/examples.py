"""Random batches with every field, for tests of objectives."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.registry import call
from polgrad.types import Batch, Outputs

ROWS, LENGTH, VOCAB = 8, 6, 5


def batch(seed: int = 0, *, rows: int = ROWS, length: int = LENGTH) -> Batch:
  """Groups of two; ragged masks; one fully masked pair (rows 4 and 5)."""
  random = np.random.default_rng(seed)
  normal = lambda: random.normal(size=(rows, length)).astype(np.float32)
  start, stop = random.integers(1, 3, rows), random.integers(3, length + 1, rows)
  position = np.arange(length)[None, :]
  mask = (position >= start[:, None]) & (position < stop[:, None])
  mask[4:6] = False
  advantages = np.repeat(random.normal(size=(rows, 1)), length, axis=1).astype(np.float32)
  return Batch(
    tokens=random.integers(0, VOCAB, (rows, length)).astype(np.int32),
    segment_ids=(position < stop[:, None]).astype(np.int32),
    mask=mask,
    group_ids=np.repeat(np.arange(rows // 2), 2).astype(np.int32),
    behavior_logp=-1.5 + 0.3 * normal(),
    proximal_logp=-1.5 + 0.3 * normal(),
    reference_logp=-1.5 + 0.3 * normal(),
    teacher_logp=-1.5 + 0.3 * normal(),
    advantages=advantages,
    returns=normal(),
    old_values=normal(),
    rewards=random.normal(size=rows).astype(np.float32),
    label=np.tile([1.0, 0.0, 0.0, 1.0], rows)[:rows].astype(np.float32),
    weights=random.uniform(0.5, 1.5, rows).astype(np.float32),
  )


def leaves(seed: int = 1, *, rows: int = ROWS, length: int = LENGTH) -> dict[str, np.ndarray]:
  """What stands for parameters: log-probs, entropies, values and logits of every token."""
  random = np.random.default_rng(seed)
  shape = (rows, length)
  return {
    'logp': (-1.5 + 0.3 * random.normal(size=shape)).astype(np.float32),
    'entropy': random.uniform(0.5, 1.5, shape).astype(np.float32),
    'values': random.normal(size=shape).astype(np.float32),
    'values_after': np.random.default_rng(seed + 1).normal(size=shape).astype(np.float32),
    'logits': random.normal(size=(*shape, VOCAB)).astype(np.float32),
  }


def outputs(x: dict, stats: dict) -> Outputs:
  """Outputs from `leaves`, with the statistics of the logits that an objective asks for."""
  teacher = jnp.flip(jnp.asarray(x['logits']), -1)
  arrays = {'logits': x['logits'], 'teacher_logits': jax.lax.stop_gradient(teacher)}
  return Outputs(
    logp=x['logp'],
    entropy=x['entropy'],
    values=x['values'],
    values_after=x['values_after'],
    stats={name: call(f, arrays) for name, f in stats.items()},
  )


def changed(made: Any, **attributes) -> Any:
  """A copy of a frozen dataclass in which attributes or methods are replaced, derived ones included."""
  other = copy.copy(made)
  for name, value in attributes.items():
    object.__setattr__(other, name, value)
  return other
