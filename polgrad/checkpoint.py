"""Checkpoints, stored by Orbax: pytrees of arrays with a piece of JSON, each complete or absent."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from polgrad import barriers, paths
from polgrad.digests import digests, not_finite, path_name
from polgrad.progress import BEST

if TYPE_CHECKING:  # Orbax takes a third of a second, so the functions that need it import it
  import orbax.checkpoint as ocp

# The pytrees of a checkpoint. Parameters are stored apart, so that they can be read alone.
TREES = ('params', 'rest')


class _Kept:
  """Keeps the newest checkpoints and one more: a preservation policy of Orbax."""

  def __init__(self, newest: int, best: Callable[[], int]):
    self.newest, self.best = newest, best

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    first, best = len(checkpoints) - self.newest, self.best()
    return [i >= first or one.step == best for i, one in enumerate(checkpoints)]


def manager(
  folder: str, *, keep: int = 2, best: Callable[[], int] = lambda: -1
) -> 'ocp.CheckpointManager':
  """Opens or creates a folder of checkpoints, which keeps the newest `keep` and the best one.

  Saving is asynchronous, so `close()` the manager to wait for the last save; and it is atomic, so an
  interrupted save leaves no checkpoint.

  Args:
    folder: a local path, or one such as gs://bucket/folder.
    keep: number of checkpoints.
    best: () -> number of the best checkpoint at this time, -1 for none.
  """
  import orbax.checkpoint as ocp

  # Until here processes may take very different times, and some runtimes wait for each other for 30 s.
  barriers.together('beginning of the run')
  handlers = {name: ocp.StandardCheckpointHandler() for name in TREES}
  checkpoints = ocp.CheckpointManager(
    _absolute(folder),
    options=ocp.CheckpointManagerOptions(preservation_policy=_Kept(keep, best), create=True),
    item_handlers=handlers | {'meta': ocp.JsonCheckpointHandler()},
  )
  # Orbax would ask whether to stop by the number of the checkpoint; `preemption` numbers its own calls.
  checkpoints.reached_preemption = lambda step: False
  return checkpoints


def _absolute(folder: str) -> epath.Path:
  """The absolute path of a folder; `epath` would put the current folder before gs://."""
  return epath.Path(folder if paths.REMOTE in folder else os.path.abspath(folder))


def save(
  checkpoints: 'ocp.CheckpointManager', step: int, trees: Mapping[str, Any], meta: Mapping
) -> None:
  """Starts writing checkpoint number `step`, with the digest of every array.

  Args:
    trees: the pytrees by their names in `TREES`.
    meta: values that JSON can hold; `read_meta` returns them.

  Raises:
    FloatingPointError: parameters, moments of the optimizer or anchors are not finite; nothing is saved.
  """
  import orbax.checkpoint as ocp

  barriers.together('checkpoint')
  bad = [
    f'{name}/{path}'
    for name, tree in trees.items()
    for path in not_finite(tree)
    if name == 'params' or path.startswith(('opt_state', 'anchors', 'learned'))
  ]
  if bad:
    raise FloatingPointError(
      f'step {step}: {len(bad)} arrays are not finite, such as {bad[:3]}, so no checkpoint is written; '
      f'the last whole one in {checkpoints.directory} is {checkpoints.latest_step()}'
    )
  meta = {**meta, 'digests': {name: digests(tree) for name, tree in trees.items()}}
  meta['digest'] = digest_of(meta)
  items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
  checkpoints.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))


def read_meta(checkpoints: 'ocp.CheckpointManager', step: int) -> dict:
  """The `meta` of checkpoint number `step`.

  Raises:
    ValueError: the checkpoint is damaged.
  """
  import orbax.checkpoint as ocp

  with _named(checkpoints, step, 'meta'):
    meta = dict(
      checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    )
    if meta.pop('digest', None) != digest_of(meta):
      raise ValueError('its own digest is missing or differs')
  return meta


def digest_of(meta: Mapping) -> str:
  """The digest of values that JSON can hold."""
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def restore(checkpoints: 'ocp.CheckpointManager', step: int, name: str, like: Any) -> Any:
  """Reads one pytree of checkpoint number `step`, and compares it with its digests.

  Args:
    name: of `TREES`.
    like: pytree of arrays or `jax.ShapeDtypeStruct`, whose dtypes and shardings the result has.

  Raises:
    ValueError: the checkpoint holds other arrays or shapes, and the message names the first that differ;
      or it is damaged.
  """
  import orbax.checkpoint as ocp

  stored = read_meta(checkpoints, step)['digests'][name]
  with _named(checkpoints, step, name):
    metadata = checkpoints.item_metadata(step)[name].tree
  _check_fit(checkpoints, step, name, metadata, like)
  # The stored tree says where empty nodes are: those of an earlier version may be others.
  wanted = _by_path(like)
  shape_of = lambda path, x: ocp.utils.to_shape_dtype_struct(wanted[path_name(path)])
  args = ocp.args.StandardRestore(jax.tree_util.tree_map_with_path(shape_of, metadata))
  with _named(checkpoints, step, name):
    found = _by_path(checkpoints.restore(step, args=ocp.args.Composite(**{name: args}))[name])
  tree = jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in wanted])
  if _same_dtypes(metadata, like):
    now = digests(tree)
    changed = [path for path in now if now[path] != stored.get(path)]
    if changed:
      raise _damaged(checkpoints, step, f'{name}: bits of {changed[:3]} have changed')
  return tree


@contextlib.contextmanager
def _named(checkpoints: 'ocp.CheckpointManager', step: int, name: str) -> Iterator[None]:
  """Turns what reading a damaged file raises into a ValueError that names the checkpoint."""
  try:
    yield
  except Exception as error:  # of JSON, of TensorStore, of the file system
    reason = str(error).strip().split('\n')[0][:300]
    raise _damaged(checkpoints, step, f'{name}: {type(error).__name__}: {reason}') from error


def _damaged(checkpoints: 'ocp.CheckpointManager', step: int, reason: str) -> ValueError:
  earlier = sorted(s for s in checkpoints.all_steps() if s < step)
  advice = (
    f'--step={earlier[-1]} takes an earlier one of {earlier}'
    if earlier
    else 'there is no earlier one'
  )
  return ValueError(f'checkpoint {step} in {checkpoints.directory} is damaged ({reason}); {advice}')


def numbered(checkpoints: 'ocp.CheckpointManager', folder: str, step: int = -1) -> int:
  """The number of a checkpoint that is there: `step`, or what `NEWEST` and `BEST` mean.

  Args:
    folder: its name in the error.

  Raises:
    FileNotFoundError: there is no complete checkpoint of this number.
  """
  steps = sorted(checkpoints.all_steps())
  if step == BEST and steps:
    found = read_meta(checkpoints, steps[-1]).get('progress', {}).get('best_step', -1)
    if found not in steps:
      raise FileNotFoundError(
        f'no best checkpoint in {folder}: a run keeps one if config.keep_best names a metric; '
        f'there are {steps}'
      )
    return found
  if step < 0 and steps:
    return steps[-1]
  if step not in steps:
    which = 'whole checkpoint' if step < 0 else f'checkpoint {step}'
    raise FileNotFoundError(f'no {which} in {folder}; there are {steps}')
  return step


def restore_anchor(checkpoints: 'ocp.CheckpointManager', step: int, name: str, like: Any) -> Any:
  """Reads one anchor of checkpoint number `step` alone, and compares it with its digests.

  Args:
    name: of the anchor.
    like: pytree of `jax.ShapeDtypeStruct` with shardings.

  Raises:
    ValueError: the checkpoint has no such anchor, or one of another model; or it is damaged.
  """
  import orbax.checkpoint as ocp

  stored = read_meta(checkpoints, step)['digests']['rest']
  names = sorted({path.split('/')[1] for path in stored if path.startswith('anchors/')})
  if name not in names:
    raise ValueError(
      f'checkpoint {step} in {checkpoints.directory} has no anchor {name!r}; it has {names}'
    )
  with _named(checkpoints, step, 'rest'):
    metadata = checkpoints.item_metadata(step)['rest'].tree['anchors'][name]
  _check_fit(checkpoints, step, f'anchor {name}', metadata, like)
  wanted = {'anchors': {name: like}}
  args = ocp.args.PyTreeRestore(
    item=wanted,
    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    partial_restore=True,
  )
  with _named(checkpoints, step, 'rest'):
    folder = epath.Path(checkpoints.directory) / str(step) / 'rest'
    tree = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder, args=args)
  found = digests(tree)
  changed = [path for path in found if found[path] != stored.get(path)]
  if changed and _same_dtypes({'anchors': {name: metadata}}, wanted):
    raise _damaged(checkpoints, step, f'bits of {changed[:3]} have changed')
  return tree['anchors'][name]


def _check_fit(
  checkpoints: 'ocp.CheckpointManager', step: int, name: str, metadata: Any, like: Any
) -> None:
  """Refuses a stored pytree whose paths or shapes differ from those of `like`."""
  saved, wanted = _shapes(metadata), _shapes(like)
  where = f'{name} of checkpoint {step} in {checkpoints.directory} do not fit'
  if saved.keys() != wanted.keys():
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    raise ValueError(f'{where}: it lacks {missing[:5]}, and has {extra[:5]} that the model has not')
  wrong = [f'{k}: {saved[k]}, not {wanted[k]}' for k in sorted(wanted) if saved[k] != wanted[k]]
  if wrong:
    raise ValueError(f'{where}: shapes differ: {"; ".join(wrong[:5])}')


def _by_path(tree: Any) -> dict[str, Any]:
  """The leaves by their paths, for example 'layers/gate', in the order of the tree."""
  return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shape of every array by its path."""
  return {path: tuple(x.shape) for path, x in _by_path(tree).items()}


def _same_dtypes(metadata: Any, like: Any) -> bool:
  """Whether arrays are read in the dtypes in which they were stored, so bits can be compared."""
  dtypes = lambda tree: {path: np.dtype(x.dtype) for path, x in _by_path(tree).items()}
  return dtypes(metadata) == dtypes(like)
