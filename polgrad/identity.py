"""What a run is: its configuration and the files that it reads, so that it is resumed only as itself."""

import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from polgrad import __version__

# Values of the configuration that change neither data nor updates, and the numbers of steps.
FREE = (
  *('checkpoint_every', 'keep_checkpoints', 'log_every', 'show_samples', 'samples_every'),
  *('tensorboard', 'max_skipped', 'max_silent', 'evaluation.*', 'mesh.*', 'phases.*.steps'),
  *('phases.*.verifier_*', 'phases.*.isolate_verifiers', 'phases.*.micro_batches'),
  *('phases.*.share_prompts', 'phases.*.pack', 'phases.*.collect.slots'),
)
SMALL = 64 * 2**20  # bytes of a file up to which it is read whole; of larger ones the ends are read


def describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The identity of a run, in values that JSON can hold: configuration, digests of files, version."""
  values = json.loads(config.to_json_best_effort())
  paths = sorted({path for path in _paths(values) if path.exists()})
  return {
    'config': values,
    'files': {str(path): _digest(path) for path in paths},
    'version': __version__,
  }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """What differs between two identities, one text each; values in `FREE` may differ."""
  old, new = (dict(_leaves(one['config'])) for one in (before, now))
  found = [
    f'config.{key}: {old.get(key, "absent")!r} before, {new.get(key, "absent")!r} now'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not any(fnmatch.fnmatch(key, free) for free in FREE)
  ]
  for path in sorted(before['files'].keys() & now['files'].keys()):
    if before['files'][path] != now['files'][path]:
      found.append(f'{path}: other contents than before')
  if before['version'] != now['version']:
    found.append(f'polgrad: {before["version"]} before, {now["version"]} now')
  return found


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """The values of a configuration by dotted path."""
  if isinstance(tree, Mapping) and tree:
    for key, value in tree.items():
      yield from _leaves(value, f'{path}.{key}' if path else key)
  else:
    yield path, tree


def _paths(values: Mapping) -> Iterator[pathlib.Path]:
  """Files and folders that a configuration names: paths, and files of functions."""
  for key, value in _leaves(values):
    last = key.rpartition('.')[2]
    if isinstance(value, str) and value:
      if last in ('path', 'adapter'):
        yield pathlib.Path(value)
      elif last == 'name' and ':' in value:
        yield pathlib.Path(value.rpartition(':')[0])


def _digest(path: pathlib.Path) -> str:
  """The digest of a file, or of the names and contents of the files of a folder."""
  files = sorted(f for f in path.rglob('*') if f.is_file()) if path.is_dir() else [path]
  total = hashlib.sha256()
  for file in files:
    size = file.stat().st_size
    total.update(f'{file.relative_to(path)} {size}\n'.encode())
    with file.open('rb') as f:
      total.update(f.read(min(size, SMALL)))
      if size > SMALL:
        f.seek(max(size - SMALL, SMALL))
        total.update(f.read())
  return total.hexdigest()
