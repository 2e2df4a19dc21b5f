"""Functions as configuration: `part` writes a function down as data, `bind` reads it back.

    part(surrogates.clipped, eps_high=0.28)
    -> {'name': 'clipped', 'eps_low': 0.2, 'eps_high': 0.28}

A module lists what can be named in a `TABLE` and exports `Part = Annotated[Callable, TABLE]`. A
function that takes another function annotates that argument with the module's `Part`; this is how
`bind` knows where to look a name up. Two kinds of function stand in a table:

* an elementary function takes arrays by position and knobs by keyword; `bind` fixes the knobs.
  The *names* of its positional arguments say what it reads (see `inputs` and `call`);
* a factory takes keywords only; `bind` calls it.
"""

import collections
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections


class Weighted(NamedTuple):
  """A bound part and the number that multiplies it."""

  weight: float
  fn: Callable


def table(*functions: Callable) -> dict[str, Callable]:
  """The functions under their own names; a name may stand once.

  Raises:
    ValueError: a name that stands twice, or a knob called `name` or `weight`, which parts have.
  """
  names = [f.__name__ for f in functions]
  if len(set(names)) != len(names):
    raise ValueError(f'a name stands twice in {names}')
  for f in functions:
    taken = {'name', 'weight'} & _knobs(f).keys()
    if taken:
      raise ValueError(f'{f.__name__}: a knob cannot be called {sorted(taken)}')
  return dict(zip(names, functions))


def either(*choices: dict[str, Callable]) -> Mapping[str, Callable]:
  """Several tables as one; what is registered in one of them later is found here too."""
  return collections.ChainMap(*choices)


def register(choices: dict[str, Callable], fn: Callable) -> Callable:
  """Adds a function of your own to a table, so that a configuration can name it.

      registry.register(verifiers.TABLE, is_haiku)

  Raises:
    ValueError: the name is polgrad's already.
  """
  known = choices.get(fn.__name__)
  if known is not None and known.__module__.startswith('polgrad.'):
    raise ValueError(f'{fn.__name__!r} is taken by {known.__module__}')
  choices[fn.__name__] = fn
  return fn


def part(fn: Callable, **knobs) -> ml_collections.ConfigDict:
  """Writes `fn` and all its knobs, defaults included, as JSON-printable data.

  Raises:
    ValueError: a knob that `fn` does not have, or a required one that is missing.
  """
  spec = {'name': fn.__name__}
  parameters = _knobs(fn)
  _check_names(fn.__name__, knobs, parameters)
  for name, parameter in parameters.items():
    value = knobs.get(name, parameter.default)
    if value is inspect.Parameter.empty:
      raise ValueError(f'{fn.__name__} needs {name!r}')
    if isinstance(parameter.default, float) and isinstance(value, int):
      value = float(value)  # a ConfigDict would hold later overrides to int
    spec[name] = part(value) if inspect.isfunction(value) else value
  return ml_collections.ConfigDict(spec)


def weighted(weight: float, spec: Mapping) -> ml_collections.ConfigDict:
  """A part with its coefficient: `weighted(0.04, part(penalties.k3))`."""
  return ml_collections.ConfigDict({'weight': float(weight), **spec})


def bind(spec: Mapping, choices: Mapping[str, Callable], path: str = 'config') -> Any:
  """Turns a part back into a function (or, for a factory, into what it makes).

  Args:
    spec: what `part` wrote, perhaps with overridden knobs; `weighted` gives a `Weighted`.
    choices: the table in which the name is looked up.
    path: where the part stands in the configuration, for error messages.

  Raises:
    ValueError: an unknown name or knob; the message lists the valid ones.
    TypeError: a knob of the wrong type.
  """
  if not isinstance(spec, Mapping | ml_collections.ConfigDict) or 'name' not in spec:
    raise TypeError(f'{path}: expected a part with a name out of {sorted(choices)}, got {spec!r}')
  spec = dict(spec)
  name = spec.pop('name')
  if name not in choices:
    raise ValueError(f'{path}.name: unknown {name!r}; valid: {sorted(choices)}')
  weight = spec.pop('weight', None)
  fn = choices[name]
  parameters = _knobs(fn)
  _check_names(path, spec, parameters)
  hints = typing.get_type_hints(fn, include_extras=True)
  bound = {}
  for knob, parameter in parameters.items():
    value = spec.get(knob, parameter.default)
    if value is inspect.Parameter.empty:
      raise ValueError(f'{path}: {name} needs {knob!r}')
    bound[knob] = _bind_knob(value, hints.get(knob), parameter, f'{path}.{knob}')
  result = functools.partial(fn, **bound) if inputs(fn) else fn(**bound)
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
  kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return tuple(p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds)


def call(fn: Callable, arrays: Mapping[str, Any]) -> Any:
  """Calls `fn` with the arrays that it names."""
  return fn(*(arrays[name] for name in inputs(fn)))


def _knobs(fn: Callable) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(fn).parameters
  return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _check_names(where: str, given: Mapping, parameters: Mapping) -> None:
  unknown = sorted(set(given) - set(parameters))
  if unknown:
    raise ValueError(f'{where}: unknown {unknown}; valid: {sorted(parameters)}')


def _bind_knob(value, hint, parameter: inspect.Parameter, path: str):
  """Binds nested parts, and checks plain values against the default's type (or the hint)."""
  if typing.get_origin(hint) is typing.Annotated:
    if inspect.isfunction(value):
      value = part(value)
    bound = bind(value, hint.__metadata__[0], path)
    if isinstance(bound, Weighted):
      raise TypeError(f'{path}: one part stands here, so it takes no weight')
    return bound
  arguments = typing.get_args(hint)
  if arguments and typing.get_origin(arguments[-1]) is typing.Annotated:
    return {k: bind(v, arguments[-1].__metadata__[0], f'{path}.{k}') for k, v in value.items()}
  has_default = parameter.default is not inspect.Parameter.empty
  expected = type(parameter.default) if has_default else hint
  if not isinstance(expected, type) or (isinstance(value, expected) and expected is not int):
    return tuple(value) if isinstance(value, list) else value
  if expected is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if expected is int and isinstance(value, int) and not isinstance(value, bool):
    return value
  if expected is tuple and isinstance(value, list):
    return tuple(value)
  if expected is dict and isinstance(value, ml_collections.ConfigDict):
    return value.to_dict()
  raise TypeError(f'{path}: expected {expected.__name__}, got {type(value).__name__} {value!r}')
