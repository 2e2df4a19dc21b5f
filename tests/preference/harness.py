"""Oracles of preference methods, and arrays on which a method's loss must meet its oracle.

An oracle is written in NumPy from the paper: `oracle(x, const) -> float`. `x` and `const` are equal
dicts of arrays; what the paper puts under stop-gradient is read from `const`, and all else from `x`. So
central differences of the oracle by `x['logp']` are the gradient that the paper means.

A module tests/preference/oracles_*.py has

    ORACLES = {'dpo': dpo, ...}             the oracle of each method, with its default knobs
    VARIANTS = [('dpo', knobs, oracle), ...]  further knobs of a method; may be left out
"""

import collections
import importlib
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import methods, objectives
from polgrad.arrays import ARRAYS, MODEL
from polgrad.methods import Method
from tests.runs import method_of

Arrays = dict[str, np.ndarray]
Oracle = Callable[[Arrays, Arrays], float]

NAMES = list(methods.FAMILIES['preference'])
ROWS, LENGTH, VOCABULARY = 8, 5, 7
EMPTY_ROW = 5
LIVE = (*MODEL, 'logits')


def modules() -> list:
  """The files of oracles; they import this module, so they are read when they are asked for."""
  found = sorted(path.stem for path in pathlib.Path(__file__).parent.glob('oracles_*.py'))
  names = [name for name in found if name != 'oracles_test']
  return [importlib.import_module(f'tests.preference.{name}') for name in names]


def oracles() -> dict[str, list[Oracle]]:
  """The oracles of every method in all files; there should be one each."""
  found = collections.defaultdict(list)
  for module in modules():
    for name, oracle in module.ORACLES.items():
      found[name].append(oracle)
  return dict(found)


def variants() -> list[tuple[str, dict, Oracle]]:
  """Methods with other knobs than the default ones, and their oracles."""
  return [row for module in modules() for row in getattr(module, 'VARIANTS', [])]


def make(name: str, knobs: Mapping) -> Method:
  """A method by name; without knobs as in a run on addition."""
  return methods.TABLE[name](**knobs) if knobs else method_of(name)


def random_arrays(method: Method, seed: int = 0) -> Arrays:
  """Everything that the method reads, in float64: eight rows of five tokens, masks with holes.

  Rows 2i and 2i + 1 are a pair, and row 5 has no tokens. A group is a pair, or four rows where the
  method compares more of them; of a method whose groups are six rows there are two groups.
  """
  rng = np.random.default_rng(seed)
  size = method.bound()[1].rows_per_prompt
  group, rows = (size, 12) if size == 6 else (2 if size == 2 else 4, ROWS)
  mask = rng.random((rows, LENGTH)) < 0.7
  mask[:, 2] = True
  mask[EMPTY_ROW] = False
  shapes = {
    'B T': (rows, LENGTH),
    'B': (rows,),
    'B n': (rows, 3),
    'B G': (rows, group),
    '... V': (rows, LENGTH, VOCABULARY),
    '... D': (rows, LENGTH, 4),
    '2': (2,),
    '': (),
  }
  x = {}
  for name in sorted(method.reads):
    spec = ARRAYS[name].shape if name in ARRAYS else 'B T'
    x[name] = rng.random(shapes[spec])
    if name.endswith('logp'):
      x[name] = -0.5 - 1.5 * x[name]
    elif spec in ('... V', '... D'):
      x[name] = 4 * x[name] - 2
  if 'label' in x:
    first = np.resize([0.9, 0.2, 1.0, 0.0], rows // 2)
    x['label'] = np.stack([first, 1 - first], axis=1).reshape(-1)
  if 'rewards' in x:
    x['rewards'] = np.round(x['rewards'], 2)
  if 'group_ids' in x:
    x['group_ids'] = np.repeat(np.arange(rows // group), group)
  if 'tokens' in x:
    x['tokens'] = rng.integers(0, VOCABULARY, (ROWS, LENGTH))
  if 'stream' in x:
    # A weighted sum has an objective for each stream; elsewhere a pair holds a row of each.
    of_pairs = isinstance(method.bound()[1], objectives.WeightedSum)
    x['stream'] = np.tile([1, 1, 0, 0] if of_pairs else [0, 1, 0, 1], ROWS // 4)
  if 'opponent' in x:
    x['opponent'] = np.tile([0.0, 1.0], ROWS // 2)
  if 'shown_label' in x:
    x['label'] = np.tile([1.0, 0.0], rows // 2)
    x['shown_label'] = np.tile([-1.0, -1, 0, 0, 1, 1], rows // 6)
  if 'wins' in x:
    x['wins'] = game(x['wins'])
  return x | {'mask': mask}


def game(wins: np.ndarray) -> np.ndarray:
  """Random numbers [B, G] as probabilities to win: rows i and j of a group have p and 1 - p."""
  p = wins.reshape(-1, *wins.shape[1:] * 2)
  upper = np.triu(p, 1)
  lower = np.tril(1 - np.swapaxes(p, 1, 2), -1)
  return (upper + lower + 0.5 * np.eye(wins.shape[1])).reshape(wins.shape)


def value_and_gradient(method: Method, x: Arrays) -> tuple[float, Arrays]:
  """The loss of a method and its gradient by what the model says; to be called with float64 enabled."""
  live = {k: jnp.asarray(v) for k, v in x.items() if k in LIVE}
  rest = {k: jnp.asarray(v) for k, v in x.items() if k not in LIVE}
  loss = lambda live: method.loss(**live, **rest)[0]
  value, gradient = jax.value_and_grad(loss)(live)
  return float(value), {k: np.asarray(v) for k, v in gradient.items()}


def differences(oracle: Oracle, x: Arrays, step: float = 1e-5) -> Arrays:
  """Central differences of an oracle by what the model says."""
  found = {}
  for name in x.keys() & set(LIVE):
    found[name] = np.zeros(x[name].shape)
    for i in np.ndindex(x[name].shape):
      ends = []
      for sign in (1, -1):
        moved = x[name].copy()
        moved[i] += sign * step
        ends.append(oracle(x | {name: moved}, x))
      found[name][i] = (ends[0] - ends[1]) / (2 * step)
  return found


# Helpers of oracles.


def total(v: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Sum over the tokens of a row, [B, T] -> [B]."""
  return np.where(mask, v, 0.0).sum(axis=1)


def mean(v: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Mean over the tokens of a row, [B, T] -> [B]; 0 in a row without tokens."""
  return total(v, mask) / np.maximum(mask.sum(axis=1), 1)


def ratio(x: Arrays, other: str = 'reference_logp') -> np.ndarray:
  """Summed log-ratio of a row to another policy, [B]."""
  return total(x['logp'] - x[other], x['mask'])


def pair(v: np.ndarray, x: Arrays) -> tuple[np.ndarray, np.ndarray]:
  """The values of the preferred and of the other row of each pair, [B] -> two of [B / 2]."""
  first = x['label'][::2] >= 0.5
  a, b = v[::2], v[1::2]
  return np.where(first, a, b), np.where(first, b, a)


def confidence(x: Arrays) -> np.ndarray:
  """The probability that the preferred row of a pair is the better one, [B / 2]."""
  return np.maximum(x['label'][::2], 1 - x['label'][::2])


def average(loss: np.ndarray, x: Arrays) -> float:
  """The mean over pairs of which both rows have tokens, [B / 2] -> number."""
  where = x['mask'].any(axis=1).reshape(-1, 2).all(axis=1)
  return float(loss[where].mean())


def soft(link: Callable, z: np.ndarray, x: Arrays) -> float:
  """The mean over pairs of p link(z) + (1 - p) link(-z)."""
  p = confidence(x)
  return average(p * link(z) + (1 - p) * link(-z), x)


def softplus(z: np.ndarray) -> np.ndarray:
  """log(1 + exp(z))."""
  return np.logaddexp(0, z)


def logistic(z: np.ndarray) -> np.ndarray:
  """-log sigmoid(z)."""
  return np.logaddexp(0, -z)


def sigmoid(z: np.ndarray) -> np.ndarray:
  """1 / (1 + exp(-z))."""
  return 1 / (1 + np.exp(-z))


def chosen_nll(x: Arrays, reduce: Callable = mean) -> float:
  """The mean of -log pi over the rows with a label above one half that have tokens."""
  where = (x['label'] > 0.5) & x['mask'].any(axis=1)
  return float(-reduce(x['logp'], x['mask'])[where].mean())
