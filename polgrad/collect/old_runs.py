"""Rows of earlier runs beside those of the present one: replay across experiments (arXiv:2311.15951).

A run that keeps all its rows (`config.rollouts.every=1`, a large `config.rollouts.rows`) leaves them in
WORKDIR/rollouts, with the log-probs of the policy that sampled them. A later run, which begins with new
parameters, trains on them too.
"""

from collections.abc import Sequence

import jax
import numpy as np

from polgrad import row_files
from polgrad.collect import replay
from polgrad.types import Batch


def load(folders: Sequence[str], like: Batch, *, rows_per_prompt: int, prompt_length: int) -> Batch:
  """All whole groups in these folders, as one batch with the arrays of `like`.

  Args:
    folders: WORKDIR/rollouts of earlier runs.
    like: a batch of the run, for the names, shapes and dtypes of its arrays.
    rows_per_prompt: consecutive rows of a group.
    prompt_length: column at which completions begin.

  Raises:
    ValueError: names the file: rows of other lengths or groups, or arrays that are missing.
    FileNotFoundError: a folder without files of rows.
  """
  found = []
  for folder in folders:
    paths = row_files.files(folder, '')
    if not paths:
      raise FileNotFoundError(
        f'{folder}: expected the folder WORKDIR/rollouts of a run, with its rows'
      )
    stored = [row_files.read(path) for path in paths]
    # Other phases of a run, such as a warm start, have sampled nothing.
    sampled = [one for one in stored if 'behavior_logp' in one.meta.get('arrays', {})]
    if not sampled:
      raise ValueError(f'{folder}: none of its files has rows that a policy has sampled')
    found += [_rows(one, like, rows_per_prompt, prompt_length) for one in sampled]
  return jax.tree.map(lambda *x: np.concatenate(x), *found)


def _rows(stored: row_files.Stored, like: Batch, size: int, prompt_length: int) -> Batch:
  """The rows of one file."""
  batch, path = row_files.as_batch(stored), stored.path
  missing = sorted(set(like.names()) - set(batch.names()))
  if missing:
    raise ValueError(f'{path}: its rows have no {missing}, which this run reads')
  if batch.tokens.shape[1] != like.tokens.shape[1]:
    raise ValueError(
      f'{path}: rows of {batch.tokens.shape[1]} columns, but this run has {like.tokens.shape[1]}: '
      'prompt_length and max_new_tokens must be those of the earlier run'
    )
  starts = {row_files.completion_start(batch, row) for row in range(len(batch.tokens))}
  if not starts <= {prompt_length}:
    raise ValueError(
      f'{path}: completions begin at columns {sorted(starts)}, not at {prompt_length}'
    )
  groups = batch.group_ids.reshape(-1, size) if len(batch.group_ids) % size == 0 else None
  if groups is None or (groups != groups[:, :1]).any():
    raise ValueError(f'{path}: its rows are not in whole groups of {size}')
  arrays = {name: np.asarray(batch[name], like[name].dtype) for name in like.names()}
  return like.with_arrays(**arrays)


def mixed(
  batch: Batch,
  old: Batch,
  *,
  fraction: float,
  rows_per_prompt: int,
  random: np.random.Generator,
) -> Batch:
  """The batch, of which round(fraction * groups) random groups are replaced by random groups of `old`.

  `group_ids` remain those of the batch. `sampled_at` of old rows is -1.

  Args:
    batch: NumPy, before it is annotated.
    old: of `load`.
    fraction: 0 to 1.
    rows_per_prompt: consecutive rows of a group.
    random: decides which groups are replaced, and by which.
  """
  old = old.replace(sampled_at=np.full(len(old.tokens), -1, np.int32))
  joined = jax.tree.map(lambda x, y: np.concatenate([x, y]), batch, old)
  groups, all_groups = (len(x.group_ids) // rows_per_prompt for x in (batch, joined))
  choice = replay.Choice(fraction)
  return replay.replaced(joined, groups, np.zeros(all_groups), choice, rows_per_prompt, random)
