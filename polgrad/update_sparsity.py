"""Which weights a run has changed: how many, with which rank, and the same ones as another run?

    python -m polgrad.update_sparsity --config=... --workdir=RUN --before=start
    python -m polgrad.update_sparsity --config=... --workdir=RUN --step=200 --before=100
    python -m polgrad.update_sparsity --model=AFTER --before=FOLDER            # Hugging Face folders
    python -m polgrad.update_sparsity ... --other=OTHER                      # overlap with another run
    python -m polgrad.update_sparsity ... --mask=changed.npz                   # for optim.masked

The model after training is chosen as `polgrad.loading` says. The one before, and that of another run
from the same start, are each `start` (the model of the configuration before training), the number of a
checkpoint of the run, or a Hugging Face folder; with --model all are folders, which are read one tensor
at a time. Weights are compared by their names in a Hugging Face folder, so a matrix is one matrix.

The fraction of unchanged weights depends on the precision of storage and of the comparison, so both are
printed ([optimizers.md](../docs/optimizers.md)).
"""

import json
import sys
import zipfile
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import flags

from polgrad import cli, loading, paths, weight_changes
from polgrad.build import Experiment
from polgrad.evaluate import init_params, restore_params
from polgrad.models import heads, hf, tensors
from polgrad.models.lora import merge
from polgrad.optim.wrappers import path_name
from polgrad.sharding import to_host
from polgrad.types import Params
from polgrad.weight_changes import PRECISIONS, Change, Overlap
from polgrad.whole_files import writing

_BEFORE = flags.DEFINE_string(
  'before', '', '`start`, the number of a checkpoint, or a folder: the model before.'
)
_OTHER = flags.DEFINE_string('other', '', 'The same of another run, to compare what both changed.')
_ATOL = flags.DEFINE_float(
  'atol',
  weight_changes.ATOL,
  'Largest difference of a weight that counts as unchanged.',
  lower_bound=0,
)
_PRECISION = flags.DEFINE_enum(
  'precision',
  'bfloat16',
  list(PRECISIONS),
  'What weights are rounded to before they are compared; "" is nothing.',
)
_RANK = flags.DEFINE_bool('rank', True, 'Compute ranks, by singular value decompositions.')
_MASK = flags.DEFINE_string(
  'mask', '', 'File to write for optim.masked: which weights changed; not with --model.'
)
START = 'start'
Tensors = Mapping[str, tensors.Tensor]


def folder(name: str) -> dict[str, tensors.Tensor]:
  """The tensors of a Hugging Face folder; nothing is read yet."""
  path = paths.path(name)
  if not path.is_dir():
    raise FileNotFoundError(f'there is no folder {path}')
  return tensors.open_folder(path)


def of_params(experiment: Experiment, params: Params) -> dict[str, tensors.Tensor]:
  """The tensors that a folder of this model would have; an adapter is merged into its base."""
  config = experiment.policy.config
  params = heads.without_head(params)
  if config.lora_rank:
    config, params = merge(config, params)
  return hf.as_tensors(config, params)


def params_of(experiment: Experiment, name: str) -> Params:
  """The parameters that --before or --other name, in a run."""
  if name == START:
    return init_params(experiment.policy, experiment.mesh, experiment.seed)
  if name.isdecimal():
    if not (cli.WORKDIR.value or cli.CHECKPOINTS.value):
      raise ValueError(f'{name} is a checkpoint of a run: name the run by --workdir')
    return restore_params(experiment, cli.checkpoint_folder(), int(name), cli.PARAMS.value)
  return loading.beside(name, experiment)[1]


def compare(
  before: Tensors, after: Tensors, against: Tensors | None, **settings
) -> Iterator[tuple[str, Change, Overlap | None, tuple[str, str]]]:
  """For each tensor: its name, its change, the overlap with `against`, and both dtypes of storage.

  Args:
    before, after, against: tensors by name, read one at a time.
    settings: of `weight_changes.change`.

  Raises:
    ValueError: the names or the shapes differ.
  """
  for other in (after, *([] if against is None else [against])):
    if before.keys() != other.keys():
      odd = sorted(before.keys() ^ other.keys())
      raise ValueError(f'the models have different tensors, such as {odd[:4]}')
  how = {name: settings[name] for name in ('atol', 'precision')}
  for name in sorted(before):
    x, y = before[name].all(), after[name].all()
    if x.shape != y.shape:
      raise ValueError(f'{name} has shape {x.shape} before and {y.shape} after')
    common = None
    if against is not None:
      moved = weight_changes.changed(x, y, **how)
      common = weight_changes.overlap(moved, weight_changes.changed(x, against[name].all(), **how))
    yield name, weight_changes.change(x, y, **settings), common, (str(x.dtype), str(y.dtype))


def write_mask(out: str, before: Params, after: Params, **how) -> None:
  """Writes which entries of the parameters changed, an array a parameter, for `optim.masked`."""
  leaves = jax.tree_util.tree_leaves_with_path(before)
  with writing(out, 'wb') as whole, zipfile.ZipFile(whole, 'w', zipfile.ZIP_DEFLATED) as file:
    for (path, first), second in zip(leaves, jax.tree.leaves(after), strict=True):
      moved = weight_changes.changed(to_host(first), to_host(second), **how)
      with file.open(f'{path_name(path)}.npy', 'w', force_zip64=True) as entry:
        np.lib.format.write_array(entry, moved, allow_pickle=False)


def row(name: str, found: Change, stored: tuple[str, str]) -> str:
  """A line of the table."""
  rank = f'{found.rank}/{found.full_rank}' if found.full_rank else ''
  kept = f'{found.sparsity:.4f}  {found.unchanged_as_stored / max(found.entries, 1):.4f}'
  return f'{name:<60} {found.entries:>12}  {kept}  {rank:>11}  {" -> ".join(dict.fromkeys(stored))}'


def main(argv: list[str]) -> None:
  loading.start(argv)
  with cli.refusals():
    if not _BEFORE.value:
      raise ValueError('name the model before: --before=start, =STEP or =FOLDER')
    how = dict(atol=_ATOL.value, precision=_PRECISION.value)
    if loading.MODEL.value:
      if _MASK.value:
        raise ValueError('--mask has the parameters of a run: name it by --config and --workdir')
      before, after = folder(_BEFORE.value), folder(loading.MODEL.value)
      against = folder(_OTHER.value) if _OTHER.value else None
    else:
      experiment, params = loading.load(loading.config())
      first = params_of(experiment, _BEFORE.value)
      if _MASK.value:
        write_mask(_MASK.value, first, params, **how)
      before, after = of_params(experiment, first), of_params(experiment, params)
      against = _OTHER.value or None
      against = against and of_params(experiment, params_of(experiment, against))
    changes, overlaps, dtypes = {}, [], set()
    title = ('tensor', 'entries', 'unchanged', 'rank', 'stored as')
    print(f'{title[0]:<60} {title[1]:>12}  {title[2]:<14}  {title[3]:>11}  {title[4]}')
    for name, found, common, stored in compare(before, after, against, rank=_RANK.value, **how):
      changes[name] = found
      overlaps += [] if common is None else [common]
      dtypes |= {stored}
      print(row(name, found, stored), flush=True)
  whole, common = weight_changes.total(changes.values()), weight_changes.together(overlaps)
  print(row('all', whole, ('', '')))
  rounded = f'rounded to {_PRECISION.value}' if _PRECISION.value else 'as stored'
  print(
    f'unchanged: |after - before| <= {_ATOL.value:g}, first {rounded}, then as stored '
    f'({", ".join(sorted({" -> ".join(dict.fromkeys(x)) for x in dtypes}))})'
  )
  if overlaps:
    chance = common.chance()
    print(
      f'of what this run changed, the other one changed {common.of_first():.4f} '
      f'(by chance {chance[0]:.4f}); the other way round {common.of_second():.4f} ({chance[1]:.4f})'
    )
  if cli.OUT.value:
    _write(cli.OUT.value, changes, whole, common if overlaps else None, dtypes)


def _write(out: str, changes: Mapping[str, Change], whole: Change, common, dtypes) -> None:
  """The numbers as JSON."""
  with writing(out, encoding='utf-8') as file:
    text = json.dumps(
      {
        'atol': _ATOL.value,
        'precision': _PRECISION.value,
        'stored': sorted(map(list, dtypes)),
        'all': whole._asdict() | {'sparsity': whole.sparsity},
        'overlap': None
        if common is None
        else common._asdict()
        | {'of_first': common.of_first(), 'of_second': common.of_second()}
        | dict(zip(('chance_first', 'chance_second'), common.chance())),
        'tensors': {name: one._asdict() for name, one in changes.items()},
      },
      indent=1,
    )
    file.write(text)
  print(f'wrote {out}', file=sys.stderr)


if __name__ == '__main__':
  cli.run(main)
