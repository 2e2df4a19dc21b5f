"""Density ratios of the prompts of feedback: how likely a prompt is among the good rows, for BCO.

    python -m polgrad.prompt_weights --model=FOLDER --feedback=labels.jsonl --out=weighted.jsonl

Good and bad completions may have been collected on different prompts. BCO (arXiv:2404.04656) then weighs
each bad row by p(prompt | good) / p(prompt | bad), so that bad rows count where good ones are. It is
the odds of a logistic regression, fitted on the host to all rows of the file: its features are the last
hidden states of the model, averaged over the tokens of the prompt. The file that is written has the
records of the first one with the further field `density_ratio`, which `method=bco,density_ratio=true`
reads. The model is chosen as `polgrad.loading` says; any model that tells the prompts apart will do.
"""

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from polgrad import cli, loading, sharding
from polgrad.build import Experiment
from polgrad.compiling import jit
from polgrad.data import batching, sources, tables
from polgrad.models import Policy
from polgrad.packing import padded
from polgrad.types import Array, Params
from polgrad.whole_files import writing

_FEEDBACK = flags.DEFINE_string(
  'feedback', '', 'File of JSON lines: completions with their labels.'
)
_RIDGE = flags.DEFINE_float(
  'ridge',
  1.0,
  'L2 penalty of the classifier; a larger one moves all ratios towards 1.',
  lower_bound=1e-9,
)
ROWS = 16  # prompts that are forwarded at once
LARGEST = 20.0  # of the logarithm of a ratio that is written
STEPS = 100  # of Newton's method, at most


class Classifier(NamedTuple):
  """log p(good | x) / p(bad | x) = (x - mean) / std @ weights + bias, with as many good as bad rows."""

  mean: np.ndarray  # f64[D]
  std: np.ndarray  # f64[D]
  weights: np.ndarray  # f64[D]
  bias: float

  def __call__(self, features: np.ndarray) -> np.ndarray:
    """f[N, D] -> f64[N]; the exponential is the density ratio."""
    return (features - self.mean) / self.std @ self.weights + self.bias


def fit(features: np.ndarray, good: np.ndarray, *, ridge: float = 1.0) -> Classifier:
  """Logistic regression on standardised features, in which good and bad rows count equally in sum.

      minimise sum_i c_i softplus(-s_i logit_i) + ridge / 2 |weights|^2

  s_i is 1 for a good row and -1 for a bad one, and c_i = N / (2 N_kind), N_kind being the number of rows
  of that kind. The bias has no penalty. TRL has the same objective on features that are not
  standardised.

  Args:
    features: f[N, D].
    good: bool[N].
    ridge: coefficient of the penalty, above 0.

  Raises:
    ValueError: all rows are of one kind.
  """
  good = np.asarray(good, bool)
  if good.all() or not good.any():
    raise ValueError(
      f'all {len(good)} rows are {"good" if good.all() else "bad"}; there must be both'
    )
  x = np.asarray(features, float)
  mean, std = x.mean(axis=0), x.std(axis=0)
  std = np.where(std > 0, std, 1.0)
  x = np.column_stack([(x - mean) / std, np.ones(len(x))])
  counts = np.where(good, len(x) / (2 * good.sum()), len(x) / (2 * (~good).sum()))
  penalty = np.append(np.full(x.shape[1] - 1, ridge), 0.0)

  def objective(w: np.ndarray) -> float:
    losses = np.logaddexp(0, np.where(good, -1, 1) * (x @ w))
    return float(counts @ losses + 0.5 * penalty @ w**2)

  w = np.zeros(x.shape[1])
  for _ in range(STEPS):
    p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
    gradient = x.T @ (counts * (p - good)) + penalty * w
    if np.abs(gradient).max() < 1e-9 * len(x):
      break
    curvature = (x.T * (counts * p * (1 - p))) @ x + np.diag(penalty + 1e-12)
    step = np.linalg.solve(curvature, gradient)
    # The objective is convex; a step that is too long is halved.
    while objective(w - step) > objective(w) and np.abs(step).max() > 1e-12:
      step = step / 2
    w = w - step
  return Classifier(mean, std, w[:-1], float(w[-1]))


def embed(experiment: Experiment, params: Params, prompts: Sequence[Sequence[int]]) -> np.ndarray:
  """The mean hidden state of each prompt, f64[N, D]; of one that is too long, of its last tokens."""
  policy, mesh = experiment.policy, experiment.mesh
  look = jit(functools.partial(mean_hidden, policy))
  rows = [list(prompt[-policy.config.max_length :]) for prompt in prompts]
  at_once, found = -(-ROWS // mesh.size) * mesh.size, []
  order = np.argsort(
    [len(row) for row in rows], kind='stable'
  )  # so that little padding is computed
  with jax.set_mesh(mesh):
    for start in range(0, len(rows), at_once):
      piece = [rows[i] for i in order[start : start + at_once]]
      arrays = padded(piece, at_once, experiment.tokenizer.pad_id, policy.config.max_length)
      means = look(params, *(sharding.place_batch(mesh, x) for x in arrays))
      found.append(np.asarray(sharding.to_host(means), float)[: len(piece)])
  return np.concatenate(found)[np.argsort(order)]


def mean_hidden(policy: Policy, params: Params, tokens: Array, segment_ids: Array) -> Array:
  """The last hidden state, averaged over the tokens of a row: i32[B, T], i32[B, T] -> f32[B, D]."""
  hidden = policy.hidden(params, tokens, segment_ids).astype(jnp.float32)
  there = (segment_ids > 0)[..., None]
  return jnp.sum(jnp.where(there, hidden, 0), axis=1) / jnp.sum(there, axis=1)


def accuracy(features: np.ndarray, good: np.ndarray, ridge: float = 1.0) -> float:
  """The mean over both kinds of the fraction that a fit to the other half of the rows tells right.

  Raises:
    ValueError: a half of the rows has one kind only.
  """
  half = np.random.default_rng(0).permutation(len(good)) % 2 == 0
  right = np.empty(len(good), bool)
  for part in (half, ~half):
    right[~part] = (fit(features[part], good[part], ridge=ridge)(features[~part]) > 0) == good[
      ~part
    ]
  return float((right[good].mean() + right[~good].mean()) / 2)


def told(features: np.ndarray, good: np.ndarray, ratios: np.ndarray, ridge: float = 1.0) -> str:
  """What is printed of a fit."""
  low, middle, high = np.quantile(ratios[~good], (0.05, 0.5, 0.95))
  text = (
    f'ratios of the {(~good).sum()} bad rows: median {middle:.2f}, 5% {low:.2f}, 95% {high:.2f}'
  )
  try:
    right = accuracy(features, good, ridge)
  except ValueError:
    return f'{text}; too few rows to test the classifier'
  return f'{text}; the classifier tells {right:.0%} of other rows right (chance: 50%)'


def main(argv: list[str]) -> None:
  loading.start(argv)
  with cli.refusals():
    if not (_FEEDBACK.value and cli.OUT.value):
      raise ValueError('--feedback=FILE and --out=FILE are needed')
    experiment, params = loading.load(loading.config())
    source, (raw, _) = sources.jsonl(path=_FEEDBACK.value), tables.json_lines(_FEEDBACK.value)
    prompts, good = [], []
    for row in range(len(source)):
      record = {**source[row], 'id': row}
      try:
        [read] = batching.read(record, experiment.tokenizer, ('completion',))
        good.append(batching.label(record) > 0.5)
      except ValueError as error:
        said = str(error).removeprefix(f'record {row}: ')
        raise ValueError(f'{source.place(row)}: {said}') from error
      prompts.append(read.ids[: read.prompt])
    good = np.array(good)
    features = embed(experiment, params, prompts)
    logits = fit(features, good, ridge=_RIDGE.value)(features)
  ratios = np.exp(np.clip(logits, -LARGEST, LARGEST))
  with writing(cli.OUT.value) as file:
    for record, ratio in zip(raw, ratios):
      print(json.dumps({**record, 'density_ratio': float(f'{ratio:.6g}')}), file=file)
  print(told(features, good, ratios, _RIDGE.value))


if __name__ == '__main__':
  cli.run(main)
