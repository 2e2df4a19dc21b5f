"""Functions and dataclasses as configuration: `part` writes one down as data, `bind` reads it back.

    part(surrogates.clipped, eps_high=0.28)
    -> {'name': 'surrogates.clipped', 'eps_low': 0.2, 'eps_high': 0.28}

A module lists what a configuration can name in a `TABLE` and exports
`Part = Annotated[Callable, TABLE]`. A function (or dataclass) that takes another function annotates
that argument with the `Part` of the other's module; this is how `bind` knows which names are valid
there. Three kinds of entries exist:

* An elementary function takes arrays by position and knobs by keyword. `bind` fixes the knobs and
  returns a function of the arrays. The *names* of its positional arguments say which arrays it reads
  (see `inputs` and `call`).
* A factory takes keywords only. `bind` calls it and returns the result.
* A dataclass is a factory whose fields are the knobs, so a field and its documentation are written once.

A name is qualified by its module, because different modules have functions of the same name:
`advantages.group_mean` is not `log_partition.group_mean`. A function of your own needs no entry in a
table. `part(my_reward)` writes the file and the function down, `/home/me/run.py:my_reward`.
"""

import collections
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import cloudpickle
import ml_collections

_NAMES: dict[Callable, str] = {}  # qualified names of what tables list
_OWN: dict[str, Callable] = {}  # functions that no table lists, by the name that `part` gave them


class Weighted(NamedTuple):
  """A bound part and the number that multiplies it."""

  weight: float
  fn: Callable


class Range(NamedTuple):
  """The numbers that a knob may have, written beside it: `rows: Annotated[int, Range(at_least=1)]`."""

  at_least: float = -math.inf
  above: float = -math.inf
  at_most: float = math.inf
  below: float = math.nan  # NaN: no bound, so that infinity is allowed

  def __contains__(self, x: float) -> bool:
    inside = self.at_least <= x <= self.at_most and (x > self.above or self.above == -math.inf)
    return inside and not x >= self.below

  def __str__(self) -> str:
    bounds = {n.replace('_', ' '): x for n, x in self._asdict().items() if math.isfinite(x)}
    finite = ['finite'] if self.below == math.inf else []
    return ' and '.join([*(f'{name} {x:g}' for name, x in bounds.items()), *finite])


Count = Annotated[int, Range(at_least=0)]
AtLeastOne = Annotated[int, Range(at_least=1)]
NotNegative = Annotated[float, Range(at_least=0, below=math.inf)]
Positive = Annotated[float, Range(above=0, below=math.inf)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Decay = Annotated[float, Range(at_least=0, below=1)]


def plain(hint: Any) -> Any:
  """The type without its range."""
  return hint.__origin__ if _range(hint) else hint


def table_of(hint: Any) -> Mapping[str, Callable] | None:
  """The table that the hint of a part names, `Annotated[Callable, TABLE]`; None if it is of no part."""
  found = getattr(hint, '__metadata__', ())
  return found[0] if found and isinstance(found[0], Mapping) else None


def several_of(hint: Any) -> Any:
  """The hint of each part in a slot of several, `Mapping[str, Part]`; None for other slots."""
  arguments = typing.get_args(hint)
  return arguments[-1] if arguments and table_of(arguments[-1]) is not None else None


def check_ranges(owner: Callable, values: Mapping[str, Any], path: str = '') -> None:
  """Refuses values outside the ranges that a function or dataclass writes beside its arguments.

  Raises:
    ValueError: names the argument and its range.
  """
  hints = typing.get_type_hints(owner, include_extras=True)
  for name, value in values.items():
    check_range(value, hints.get(name), f'{path}.{name}' if path else name)


def _range(hint: Any) -> Range | None:
  found = getattr(hint, '__metadata__', ())
  return found[0] if found and isinstance(found[0], Range) else None


def check_range(value: Any, hint: Any, path: str) -> None:
  """Refuses a number outside the range of a hint; other values and hints are allowed.

  Raises:
    ValueError: names `path` and the range.
  """
  if not isinstance(value, int | float) or isinstance(value, bool):
    return
  if value != value:  # math.isnan fails at integers that no float can hold
    raise ValueError(f'{path}: expected a number, got nan')
  bounds = _range(hint)
  if bounds is not None and value not in bounds:
    raise ValueError(f'{path}: expected a number {bounds}, got {value}')


def table(module: str, *functions: Callable) -> dict[str, Callable]:
  """The functions by their qualified names, for example `surrogates.clipped`.

  Args:
    module: what a user writes before the dot: `surrogates` for `surrogates.clipped`.
    functions: functions and dataclasses.

  Raises:
    ValueError: two functions with one name, one function with two names, or a knob called `name` or
      `weight`, which parts have themselves.
  """
  entries = {}
  for fn in functions:
    taken = {'name', 'weight'} & knobs_of(fn).keys()
    if taken:
      raise ValueError(f'{fn.__name__}: a knob cannot be called {sorted(taken)}')
    name = f'{module}.{fn.__name__}'
    if name in entries or _NAMES.setdefault(fn, name) != name:
      raise ValueError(f'{name!r}: another entry has this name, or {_NAMES[fn]!r} is this function')
    entries[name] = fn
  return entries


def either(*choices: dict[str, Callable]) -> Mapping[str, Callable]:
  """Several tables as one; later additions to one of them are found here too."""
  return collections.ChainMap(*choices)


def name_of(fn: Callable) -> str:
  """The name that a configuration has for a function or dataclass.

  Raises:
    ValueError: a function without a name (a lambda).
  """
  if fn in _NAMES:
    return _NAMES[fn]
  if fn.__name__ == '<lambda>':
    raise ValueError('a lambda has no name that a configuration could hold: use def')
  name = f'{_file_of(fn)}:{fn.__qualname__}'
  _OWN[name] = fn
  return name


def part(fn: Callable, **knobs) -> ml_collections.ConfigDict:
  """Writes `fn` and all its knobs, defaults included, as JSON-printable data.

  Raises:
    ValueError: a knob that `fn` does not have, or a required one that is missing.
  """
  spec = {'name': name_of(fn)}
  parameters = knobs_of(fn)
  _check_names(spec['name'], knobs, parameters)
  for name, parameter in parameters.items():
    value = knobs.get(name, parameter.default)
    if value is inspect.Parameter.empty:
      raise ValueError(f'{spec["name"]} needs {name!r}')
    if isinstance(parameter.default, float) and isinstance(value, int):
      value = float(value)  # a ConfigDict would hold later overrides to int
    spec[name] = part(value) if _is_entry(value) else value
  return ml_collections.ConfigDict(spec)


def weighted(weight: float, spec: Mapping) -> ml_collections.ConfigDict:
  """A part with its coefficient: `weighted(0.04, part(penalties.k3))`."""
  return ml_collections.ConfigDict({'weight': float(weight), **spec})


def bind(spec: Mapping, choices: Mapping[str, Callable], path: str = 'config') -> Any:
  """Turns a part back into a function (or, for a factory, into what it makes).

  Args:
    spec: what `part` wrote, perhaps with overridden knobs; `weighted` gives a `Weighted`.
    choices: the table in which the name is looked up. A name with a colon is a file and a function.
    path: the place of the part in the configuration, for error messages.

  Raises:
    ValueError: an unknown name or knob; the message lists the valid ones and suggests a near one.
    TypeError: a knob of the wrong type.
  """
  if not isinstance(spec, Mapping | ml_collections.ConfigDict) or 'name' not in spec:
    raise TypeError(f'{path}: expected a part with a name out of {sorted(choices)}, got {spec!r}')
  spec = dict(spec)
  name = spec.pop('name')
  weight = spec.pop('weight', None)
  if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
    raise TypeError(f'{path}.weight: expected a number, got {weight!r}')
  if weight is not None and not abs(weight) <= sys.float_info.max:
    raise ValueError(f'{path}.weight: expected a finite number, got {weight}')
  fn = _look_up(name, choices, path)
  parameters = knobs_of(fn)
  _check_names(path, spec, parameters)
  hints = typing.get_type_hints(fn, include_extras=True)
  bound = {}
  for knob, parameter in parameters.items():
    value = spec.get(knob, parameter.default)
    if value is inspect.Parameter.empty:
      raise ValueError(f'{path}: {name} needs {knob!r}')
    bound[knob] = _bind_knob(value, hints.get(knob), parameter, f'{path}.{knob}')
  result = functools.partial(fn, **bound) if inputs(fn) else _make(fn, bound, path)
  return result if weight is None else Weighted(weight, result)


def check_weighted(slot: str, parts: Mapping[str, Any]) -> None:
  """Refuses a part without a coefficient where a slot sums several.

  Raises:
    TypeError: names the part.
  """
  for name, one in parts.items():
    if not isinstance(one, Weighted):
      raise TypeError(f'{slot}.{name}: give it a coefficient, as in weighted(0.1, part(...))')


@functools.lru_cache(maxsize=4096)
def inputs(fn: Callable) -> tuple[str, ...]:
  """The names of the arrays that `fn` reads: its positional parameters."""
  if inspect.isclass(fn):
    return ()
  kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return tuple(p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds)


def unbound(fn: Callable) -> Callable:
  """The function without the knobs that `bind` has fixed."""
  return getattr(fn, 'func', fn)


class UnknownArray(KeyError):
  """A function names an array that is not there."""

  def __str__(self) -> str:
    return self.args[0]  # KeyError would print it in quotes


def call(fn: Callable, arrays: Mapping[str, Any]) -> Any:
  """Calls `fn` with the arrays that it names.

  Raises:
    UnknownArray: lists the arrays that there are, and suggests one.
  """
  missing = [name for name in inputs(fn) if name not in arrays]
  if missing:
    reader = unbound(fn).__name__
    known = sorted(k for k in arrays if arrays[k] is not None)
    raise UnknownArray(
      f'{reader} reads {missing[0]!r}, which is not here{suggest(missing[0], known)}'
    )
  return fn(*(arrays[name] for name in inputs(fn)))


def find(name: str, choices: Mapping[str, Callable], path: str) -> Callable:
  """The function that a user means by a name: `exact_match`, `verifiers.exact_match`, `file.py:mine`.

  Args:
    choices: the table in which the name is looked up, with or without the module before the dot.
    path: what the name was given for, for error messages.

  Raises:
    ValueError: an unknown name; the message lists the valid ones and suggests a near one.
  """
  if ':' in name:
    file, _, function = name.rpartition(':')
    return _look_up(f'{os.path.abspath(os.path.expanduser(file))}:{function}', choices, path)
  found = [fn for known, fn in choices.items() if name in (known, known.partition('.')[2])]
  if len(found) != 1:
    raise ValueError(f'{path}: unknown {name!r}{suggest(name, choices)}')
  return found[0]


def suggest(name: str, known: Iterable[str]) -> str:
  """The end of an error message: the near name, if there is one, and all valid names."""
  known = sorted(known)
  # `group_mean` should find `advantages.group_mean`, so the last components are compared as well.
  last = {k.rpartition('.')[2]: k for k in reversed(known)}
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
  near = near or [
    last[k] for k in difflib.get_close_matches(name.rpartition('.')[2], last, n=1, cutoff=0.6)
  ]
  return (f'; did you mean {near[0]!r}?' if near else ';') + f' valid: {known}'


def _look_up(name: str, choices: Mapping[str, Callable], path: str) -> Callable:
  if isinstance(name, str) and name in choices:
    return choices[name]
  if not isinstance(name, str) or ':' not in name:
    raise ValueError(f'{path}.name: unknown {name!r}{suggest(str(name), choices)}')
  if name not in _OWN:
    _OWN[name] = _load(name, path)
  return _OWN[name]


def _load(name: str, path: str) -> Callable:
  """Reads `file.py:function`, for example from the config.json of an earlier run."""
  file, _, function = name.rpartition(':')
  if not os.path.isfile(file):
    raise ValueError(f'{path}.name: {name!r} needs the file {file}, which does not exist')
  if os.path.dirname(file) not in sys.path:  # the file may import what lies beside it
    sys.path.append(os.path.dirname(file))
  spec = importlib.util.spec_from_file_location('polgrad_config_' + str(abs(hash(file))), file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # where dataclasses look up annotations that are texts
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever the file does
    del sys.modules[spec.name]
    raise ValueError(
      f'{path}.name: {file} cannot be imported: {type(error).__name__}: {error}'
    ) from error
  cloudpickle.register_pickle_by_value(module)  # other processes would not find it
  for key, value in vars(module).items():  # one file is read once for all its functions
    if callable(value) and getattr(value, '__module__', '') == module.__name__:
      _OWN.setdefault(f'{file}:{key}', value)
  if not callable(getattr(module, function, None)):
    raise ValueError(f'{path}.name: there is no function {function!r} in {file}')
  return getattr(module, function)


def _file_of(fn: Callable) -> str:
  """The file in which a function or class is written."""
  functions = [fn, *vars(fn).values()] if inspect.isclass(fn) else [fn]
  codes = [f.__code__ for f in functions if inspect.isfunction(f)]
  made = '<', dataclasses.__file__  # what the decorator writes
  files = [c.co_filename for c in codes if not c.co_filename.startswith(made)]
  found = files[0] if files else getattr(sys.modules.get(fn.__module__), '__file__', None)
  return os.path.abspath(found) if found else fn.__module__


def _is_entry(value: Any) -> bool:
  return inspect.isfunction(value) or (inspect.isclass(value) and dataclasses.is_dataclass(value))


def knobs_of(fn: Callable) -> dict[str, inspect.Parameter]:
  """The knobs of a function or dataclass, with their defaults.

  Raises:
    TypeError: a class that is no dataclass, so that its fields would be ignored.
  """
  if inspect.isclass(fn):
    own = vars(fn)
    if not dataclasses.is_dataclass(fn) or (
      own.get('__annotations__') and '__dataclass_params__' not in own
    ):
      raise TypeError(
        f'{fn.__qualname__}: it is no dataclass; write @dataclasses.dataclass(frozen=True, '
        'kw_only=True) above it'
      )
    return {f.name: _field_parameter(f) for f in dataclasses.fields(fn) if f.init}
  parameters = inspect.signature(fn).parameters
  return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _field_parameter(field: dataclasses.Field) -> inspect.Parameter:
  default = field.default
  if field.default_factory is not dataclasses.MISSING:
    default = field.default_factory()
  if default is dataclasses.MISSING:
    default = inspect.Parameter.empty
  return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _check_names(where: str, given: Mapping, parameters: Mapping) -> None:
  for name in sorted(set(given) - set(parameters)):
    raise ValueError(f'{where}: unknown {name!r}{suggest(name, parameters)}')


def _make(fn: Callable, knobs: Mapping[str, Any], path: str) -> Any:
  """Calls a factory; an error of its own names the place in the configuration."""
  try:
    return fn(**knobs)
  except re.error as error:
    raise ValueError(f'{path}: not a regular expression: {error}') from error
  except (ValueError, TypeError, FileNotFoundError) as error:
    if str(error).startswith('config'):
      raise
    raise type(error)(f'{path}: {error}') from error


def _bind_knob(value, hint, parameter: inspect.Parameter, path: str):
  """Binds nested parts, and checks plain values against the default's type (or the hint)."""
  if table_of(hint) is not None:
    return _bind_part(value, hint, path)
  value = _bind_plain(value, plain(hint), parameter, path)
  check_range(value, hint, path)
  if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
    raise ValueError(f'{path}: unknown {value!r}{suggest(str(value), typing.get_args(hint))}')
  return value


def _bind_plain(value, hint, parameter: inspect.Parameter, path: str):
  """Binds parts by name, and values that are no parts."""
  each = several_of(hint)
  if each is not None:
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
      raise TypeError(f'{path}: expected parts by name, got {value!r}')
    return {k: _bind_part(v, each, f'{path}.{k}', weight=True) for k, v in value.items()}
  has_default = parameter.default is not inspect.Parameter.empty
  expected = type(parameter.default) if has_default else hint
  if not isinstance(expected, type) or (isinstance(value, expected) and expected is not int):
    return tuple(value) if isinstance(value, list) else value
  if expected is float and isinstance(value, int) and not isinstance(value, bool):
    if abs(value) > sys.float_info.max:
      raise ValueError(f'{path}: expected a number that a float can hold, got {value}')
    return float(value)
  if expected is int and isinstance(value, int) and not isinstance(value, bool):
    return value
  if expected is tuple and isinstance(value, list):
    return tuple(value)
  if expected is dict and isinstance(value, ml_collections.ConfigDict):
    return value.to_dict()
  raise TypeError(f'{path}: expected {expected.__name__}, got {type(value).__name__} {value!r}')


def _bind_part(value, hint, path: str, *, weight: bool = False):
  """Binds a part of a slot, and checks that the slot can hold what it makes."""
  kind, choices = hint.__origin__, table_of(hint)
  bound = bind(part(value) if _is_entry(value) else value, choices, path)
  made = bound.fn if isinstance(bound, Weighted) else bound
  if isinstance(bound, Weighted) and not weight:
    raise TypeError(f'{path}: one part belongs here, so it takes no weight')
  if inspect.isclass(kind) and not isinstance(made, kind):
    raise TypeError(f'{path}: expected a {kind.__name__}, got {made!r}')
  return bound
