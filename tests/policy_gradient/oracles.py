"""What methods and functions must equal, collected from all files `oracles_*.py` beside this one.

Such a file may define

* `ORACLES`: method -> its weight, -dloss/dlogp, as a function of the arrays `harness.random_arrays`,
  or a dict of weights if the loss also moves values, entropy or statistics;
* `FIX_A`: method -> rows (overrides, loss, weight of row 0, weight of row 1) on the batch
  `harness.fix_a`;
* `FUNCTIONS`: function of `polgrad.losses` -> (knobs, its transcription). A transcription gets the
  arrays of the function's golden test as attributes: `lambda a: -a.advantages * a.logp`.
"""

import importlib
import pathlib
from collections.abc import Collection

MODULES = [
  importlib.import_module(f'tests.policy_gradient.{file.stem}')
  for file in sorted(pathlib.Path(__file__).parent.glob('oracles_*.py'))
]


def entries(table: str) -> dict:
  """The entries of a table of all files; two entries for one key are refused."""
  pairs = [pair for module in MODULES for pair in getattr(module, table, {}).items()]
  assert len(dict(pairs)) == len(pairs), f'{table}: one key has entries in two files'
  return dict(pairs)


def functions(listed: Collection) -> dict:
  """The entries of `FUNCTIONS` for these functions."""
  return {fn: row for fn, row in entries('FUNCTIONS').items() if fn in listed}


class Arrays(dict):
  """Arrays by name that are attributes as well."""

  __getattr__ = dict.__getitem__
