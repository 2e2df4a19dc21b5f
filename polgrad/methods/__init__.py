"""Published methods by name: one file each, in the folder of its family.

    from polgrad import methods

    method = methods.dapo(max_new_tokens=256)
    loss, metrics = method.loss(logp=..., behavior_logp=..., rewards=..., mask=..., group_ids=...)

Every function returns a `Method`, and its docstring is the record of the paper: source, formula,
differences, and how sure we are of the formula. CODE means that it was read in released code, PAPER in
the paper, DERIVED that it follows from one of them, MEMORY that it was written down from memory.
`polgrad.compose` joins a method with a task and a model; docs/methods.md lists all of them.
"""

import importlib
import pkgutil

from polgrad.methods import (
  controlled_decoding,
  distillation,
  multi_turn,
  policy_gradient,
  preference,
  reward_model,
  supervised,
)
from polgrad.methods.base import Method

_PACKAGES = (
  policy_gradient,
  multi_turn,
  preference,
  reward_model,
  controlled_decoding,
  distillation,
  supervised,
)
# Names of the methods by family: the files of its folder.
FAMILIES = {
  package.__name__.rpartition('.')[2]: tuple(
    sorted(file.name for file in pkgutil.iter_modules(package.__path__))
  )
  for package in _PACKAGES
}


def _function(family: str, name: str):
  """The function of a file; it has the name of the file."""
  return getattr(importlib.import_module(f'polgrad.methods.{family}.{name}'), name)


TABLE = {name: _function(family, name) for family, names in FAMILIES.items() for name in names}
globals().update(TABLE)

__all__ = ['FAMILIES', 'TABLE', 'Method', *TABLE]
