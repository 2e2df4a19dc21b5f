"""Published methods by name: one file each, in the folder of its family.

    from polgrad import methods

    method = methods.dapo(max_new_tokens=256)
    loss, metrics = method.loss(logp=..., behavior_logp=..., rewards=..., mask=..., group_ids=...)

Every function returns a `Method`, and its docstring is the record of the paper: source, formula,
differences, and how sure we are of them. CODE means that the formula was read in released code,
PAPER in the paper, DERIVED that it follows from one of them, and MEMORY that it was written down
from memory. `polgrad.compose` joins a method with a task and a model; docs/methods.md lists all of them.
"""

import importlib
import pkgutil

from polgrad.methods import distillation, policy_gradient, preference, supervised
from polgrad.methods.base import Method

FAMILIES = {
  module.__name__.rpartition('.')[2]: module
  for module in (policy_gradient, preference, distillation, supervised)
}


def _find() -> dict:
  """The function of every file; it has the name of the file."""
  found = {}
  for family in FAMILIES.values():
    for file in pkgutil.iter_modules(family.__path__):
      module = importlib.import_module(f'{family.__name__}.{file.name}')
      found[file.name] = getattr(module, file.name)
  return found


TABLE = _find()
globals().update(TABLE)

__all__ = ['FAMILIES', 'TABLE', 'Method', *TABLE]
