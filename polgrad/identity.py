"""What a run is: its configuration and the files that it reads, so that it is resumed only as itself."""

import ast
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from polgrad import __version__, paths

# Values that may differ, with all below them: they change neither data nor updates, or are numbers of
# steps. A * is one part of a path.
FREE = (
  *('checkpoint_every', 'keep_checkpoints', 'log_every', 'show_samples', 'samples_every'),
  *('rollouts', 'trackers', 'keep_best', 'best_is', 'patience', 'max_skipped', 'max_silent'),
  *('evaluation', 'mesh', 'sampler_mesh'),
  *('phases.*.steps', 'phases.*.plateau*', 'phases.*.held_out*'),
  *('phases.*.verifier_*', 'phases.*.isolate_verifiers', 'phases.*.micro_batches'),
  *('phases.*.share_prompts', 'phases.*.pack', 'phases.*.collect.slots'),
  *('engine.python', 'engine.*_s', 'engine.retries', 'engine.folder', 'engine.cache_gib'),
  'engine.layers',
  *('phases.*.collect.environment_*', 'phases.*.collect.isolate_environment'),
)
# Bytes of a file of weights up to which it is read whole; of a larger one the two ends are read.
SMALL = 64 * 2**20
# Libraries that decide the numbers of a run: of arrays, the order of data, token ids and problems.
LIBRARIES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'grain'),
  *('tokenizers', 'sentencepiece', 'jinja2', 'reasoning-gym'),
)


def describe(
  config: ml_collections.ConfigDict, data: Mapping[str, str] = types.MappingProxyType({})
) -> dict[str, Any]:
  """The identity of a run, in values that JSON can hold: configuration, digests of files, versions.

  Files are those that the configuration names: data, tokenizers with their chat templates, weights.

  Args:
    data: fingerprints of data that are no files, by the place of their source, see `build.fingerprints`.
  """
  values = json.loads(config.to_json_best_effort())
  named = {path: whole for path, whole in sorted(_paths(values), key=str) if path.exists()}
  functions = sorted({f for f in _functions(values) if os.path.exists(f.rpartition(':')[0])})
  return {
    'config': values,
    'files': {str(path): _digest(path, whole) for path, whole in named.items()}
    | {f: _source(f) for f in functions}
    | dict(data),
    'version': __version__,
    'libraries': {name: _version(name) for name in LIBRARIES},
  }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """What differs between two identities, one text each; values in `FREE` may differ."""
  old, new = (dict(leaves(one['config'])) for one in (before, now))
  found = [
    f'config.{key}: {old.get(key, "absent")!r} before, {new.get(key, "absent")!r} now'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not _free(key)
  ]
  for path in sorted(before['files'].keys() & now['files'].keys()):
    if before['files'][path] != now['files'][path]:
      found.append(f'{path}: other contents than before')
  if before['version'] != now['version']:
    found.append(f'polgrad: {before["version"]} before, {now["version"]} now')
  return found


def other_data(before: Mapping[str, Any], now: Mapping[str, Any], phase: str) -> list[str]:
  """Those `differences` that are in the data of a phase: its source, or files and functions it names."""
  place = f'config.phases.{phase}.source'
  source = now['config']['phases'][phase]['source']
  lists = (x if isinstance(x, list) else [x] for _, x in leaves(source))
  named = {place, *(str(paths.path(x)) for one in lists for x in one if isinstance(x, str) and x)}
  found = []
  for text in differences(before, now):
    what = text.partition(': ')[0]
    if what in named or what.startswith(f'{place}.'):
      found.append(text)
  return found


def other_libraries(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Libraries whose version differs from before, one text each; a run resumes with them all the same.

  They may change the last bits of a run, but after an upgrade it must still be possible to resume it.
  """
  old, new = before.get('libraries', {}), now['libraries']
  return [
    f'{name}: {old[name]} before, {new[name]} now' for name in sorted(old) if old[name] != new[name]
  ]


def _version(library: str) -> str:
  try:
    return importlib.metadata.version(library)
  except importlib.metadata.PackageNotFoundError:
    return 'none'


def _free(key: str) -> bool:
  """Whether a value may differ: a pattern of `FREE` fits its path, or the beginning of its path."""
  own = key.split('.')
  patterns = [pattern.split('.') for pattern in FREE]
  return any(
    len(parts) <= len(own) and all(map(fnmatch.fnmatchcase, own, parts)) for parts in patterns
  )


def leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """The values of a configuration by dotted path."""
  if isinstance(tree, Mapping) and tree:
    for key, value in tree.items():
      yield from leaves(value, f'{path}.{key}' if path else key)
  else:
    yield path, tree


def _paths(values: Mapping) -> Iterator[tuple[pathlib.Path, bool]]:
  """Files and folders that the configuration of a run names, and whether they are read whole.

  Data are read whole. The knob of a source that holds a file may have any name, so each text of a source
  that is the path of a file counts. Of weights the two ends are enough.
  """
  for key, value in leaves(values):
    name, data = key.rpartition('.')[2], '.source.' in key
    if not value or _free(key):
      continue
    for text in value if isinstance(value, list) else [value]:
      # Only these are made to paths: the URL of a judge, for example, is none.
      named = name in ('path', 'adapter', 'ensemble', 'old_runs')
      if not isinstance(text, str) or not (named or (data and os.sep in text)):
        continue
      path = paths.path(text)
      # Data in a folder elsewhere have a fingerprint of their own, see `describe`.
      elsewhere = data and paths.REMOTE in text
      if path.is_file() or (named and not elsewhere):
        yield path, data


def _functions(values: Mapping) -> Iterator[str]:
  """Functions of a user's files, as file.py:function."""
  for key, value in leaves(values):
    if key.rpartition('.')[2] == 'name' and ':' in str(value) and not _free(key):
      yield str(value)


def _source(function: str) -> str:
  """The digest of one function of a file, without its comments; other parts of the file may change."""
  file, _, name = function.rpartition(':')
  tree = ast.parse(pathlib.Path(file).read_bytes())
  found = [ast.dump(node) for node in tree.body if getattr(node, 'name', None) == name]
  return hashlib.sha256(''.join(found).encode()).hexdigest()


def _digest(path: pathlib.Path, whole: bool) -> str:
  """The digest of a file, or of the names and contents of the files of a folder."""
  files = sorted(paths.files(path)) if path.is_dir() else [path]
  total = hashlib.sha256()
  for file in files:
    size = paths.size(file)
    total.update(f'{file.relative_to(path)} {size}\n'.encode())
    with file.open('rb') as f:
      if whole:
        contents = hashlib.sha256()
        for chunk in iter(lambda: f.read(SMALL), b''):
          contents.update(chunk)
        total.update(contents.digest())
        continue
      total.update(f.read(min(size, SMALL)))
      if size > SMALL:
        f.seek(max(size - SMALL, SMALL))
        total.update(f.read())
  return total.hexdigest()
