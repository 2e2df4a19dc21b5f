"""Checkpoints, stored by Orbax: pytrees of arrays with a piece of JSON, each complete or absent."""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

# The pytrees of a checkpoint. Parameters are stored apart, so that they can be read alone.
TREES = ('params', 'rest')


def manager(folder: str, *, keep: int = 2) -> ocp.CheckpointManager:
  """Opens or creates a folder of checkpoints, which keeps the newest `keep`.

  Saving is asynchronous, so `close()` the manager to wait for the last save; and it is atomic, so an
  interrupted save leaves no checkpoint.
  """
  handlers = {name: ocp.StandardCheckpointHandler() for name in TREES}
  return ocp.CheckpointManager(
    epath.Path(folder).absolute(),
    options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    item_handlers=handlers | {'meta': ocp.JsonCheckpointHandler()},
  )


def save(
  checkpoints: ocp.CheckpointManager, step: int, trees: Mapping[str, Any], meta: Mapping
) -> None:
  """Starts writing checkpoint number `step`.

  Args:
    trees: the pytrees by their names in `TREES`.
    meta: values that JSON can hold; `read_meta` returns them.
  """
  items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
  checkpoints.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(dict(meta)), **items))


def read_meta(checkpoints: ocp.CheckpointManager, step: int) -> dict:
  """The `meta` of checkpoint number `step`."""
  return checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def restore(checkpoints: ocp.CheckpointManager, step: int, name: str, like: Any) -> Any:
  """Reads one pytree of checkpoint number `step`.

  Args:
    name: of `TREES`.
    like: pytree of arrays or `jax.ShapeDtypeStruct`, whose dtypes and shardings the result has.

  Raises:
    ValueError: the checkpoint holds other arrays or shapes; the message names the first that differ.
  """
  _check_fit(checkpoints, step, name, like)
  args = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
  return checkpoints.restore(step, args=ocp.args.Composite(**{name: args}))[name]


def latest(checkpoints: ocp.CheckpointManager, folder: str) -> int:
  """The number of the newest checkpoint.

  Args:
    folder: its name in the error.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
  """
  step = checkpoints.latest_step()
  if step is None:
    raise FileNotFoundError(f'no whole checkpoint in {folder}')
  return step


def _check_fit(checkpoints: ocp.CheckpointManager, step: int, name: str, like: Any) -> None:
  """Refuses a stored pytree whose paths or shapes differ from those of `like`."""
  saved = _shapes(checkpoints.item_metadata(step)[name].tree)
  wanted = _shapes(like)
  where = f'{name} of checkpoint {step} in {checkpoints.directory} do not fit'
  if saved.keys() != wanted.keys():
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    raise ValueError(f'{where}: it lacks {missing[:5]}, and has {extra[:5]} that the model has not')
  wrong = [f'{k}: {saved[k]}, not {wanted[k]}' for k in sorted(wanted) if saved[k] != wanted[k]]
  if wrong:
    raise ValueError(f'{where}: shapes differ: {"; ".join(wrong[:5])}')


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shape of every array by its path, for example 'layers/gate'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(_key(k) for k in path): tuple(x.shape) for path, x in leaves}


def _key(entry: Any) -> str:
  """The text of one entry of a tree path, which is an attribute, a dict key or an index."""
  for field in ('name', 'key', 'idx'):
    if hasattr(entry, field):
      return str(getattr(entry, field))
  return str(entry)
