"""Values of a configuration that a command line changes, and parts that it exchanges.

    apply(config, {'config.phases.train.optimizer.schedule.name': 'cosine',
                   'config.phases.train.optimizer.schedule.steps': '100'}, build.TABLE)

A path ends at a knob of a part, and its text becomes a value of the knob's type. A path that ends at
`name` exchanges the part: knobs that the old and the new part share keep their values, and others that
are not given get the defaults of the new part. Where a slot holds several parts by name, a path with a
new name adds a part. A part may be named without its module, as `cosine` for `optim.cosine`.
"""

import ast
import inspect
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from polgrad.registry import find, knobs_of, name_of, part, plain, several_of, suggest, table_of

Changes = Mapping[str, str]  # path, from 'config' on, -> text


def apply(config: Mapping | ConfigDict, changes: Changes, choices: Mapping) -> ConfigDict:
  """The configuration with these changes.

  Args:
    config: what `registry.part` wrote.
    changes: texts by dotted path, such as 'config.seed'.
    choices: the table of the outermost part.

  Raises:
    ValueError: an unknown path, a name that its slot does not have, a text that is no value of the knob,
      or a new part with a knob that has neither value nor default; the message names the path and the
      valid choices.
  """
  tree = ConfigDict(config).to_dict()
  # Parts are exchanged before their knobs are changed, outer parts first.
  for path in sorted(changes, key=lambda path: (path.count('.'), not path.endswith('.name'))):
    _, *keys = path.split('.')
    tree = _Slot('part', choices).changed(tree, keys, 'config', path, changes)
  return ConfigDict(tree)


def not_default(config: Mapping | ConfigDict, choices: Mapping) -> dict[str, tuple[Any, Any]]:
  """The values of a configuration that are not the defaults of their parts.

  Of a part that this machine does not have, such as a function in a file that is not here, nothing is
  compared.

  Args:
    config: what `registry.part` wrote.
    choices: the table of the outermost part.

  Returns:
    (value, default) by dotted path. Knobs without a default have None there; of a part that is not the
    default, the name is listed.
  """
  found = {}

  def compare(node: Any, table: Mapping, path: str) -> None:
    try:
      slots = _slots(find(node['name'], table, path))
    except (ValueError, OSError, ImportError, KeyError, TypeError, NameError):
      return
    for knob in slots.keys() & node.keys():
      slot, value, here = slots[knob], node[knob], f'{path}.{knob}'.removeprefix('.')
      empty = slot.default is inspect.Parameter.empty
      if slot.kind == 'parts':
        for name, one in value.items():
          compare(one, slot.choices, f'{here}.{name}')
          found[f'{here}.{name}.name'] = (one['name'], None)
      elif slot.kind == 'part':
        default = None if empty else getattr(slot.default, 'name', None) or name_of(slot.default)
        if value['name'] != default:
          found[f'{here}.name'] = (value['name'], default)
        compare(value, slot.choices, here)
      elif empty or _listed(value) != _listed(slot.default):
        found[here] = (value, None if empty else slot.default)

  compare(ConfigDict(config).to_dict(), choices, '')
  return found


def _listed(value: Any) -> Any:
  """The value as JSON has it, where a tuple is a list."""
  return list(value) if isinstance(value, tuple) else value


class _Slot(NamedTuple):
  """What a place in a configuration holds: a part, several parts by name, or a plain value."""

  kind: str  # 'part', 'parts' or 'plain'
  choices: Mapping = {}  # the table of the parts
  hint: Any = None  # type of a plain value
  default: Any = inspect.Parameter.empty  # empty: the knob is required
  weighted: bool = False  # the part is one of several, so it may have a weight

  def changed(self, node: Any, keys: list[str], at: str, path: str, changes: Changes) -> Any:
    """The node after the change of `path`.

    Args:
      node: the value in this slot.
      keys: the rest of `path`, below the node.
      at: path of the node.
      path: path of the change, which also selects its text in `changes`.
    """
    key, *rest = keys or ['']
    below = f'{at}.{key}'
    if self.kind == 'part' and keys == ['name']:
      return self._exchanged(node, at, changes)
    slot = self._below(node, key, at, path)
    if rest:
      return node | {key: slot.changed(node.get(key, {}), rest, below, path, changes)}
    if slot.kind != 'plain':
      name = f'{below}.name' if slot.kind == 'part' else f'{below}.NAME.name'
      raise ValueError(f'{path}: name the part by {name}=...; valid: {sorted(slot.choices)}')
    return node | {key: slot.value(changes[path], node.get(key), path)}

  def _below(self, node: Any, key: str, at: str, path: str) -> '_Slot':
    """The slot at `key` of a node."""
    if self.kind == 'parts':
      if key in node or path == f'{at}.{key}.name':
        return _Slot('part', self.choices, weighted=True)
      raise ValueError(
        f'{at}: unknown {key!r}{suggest(key, node)}; {at}.{key}.name=... adds a part'
      )
    if self.kind == 'part':
      slots = _slots(find(node['name'], self.choices, at))
      slots |= {'weight': _Slot('plain', hint=float)} if self.weighted or 'weight' in node else {}
      if key not in slots:
        raise ValueError(f'{at}: {node["name"]} has no {key!r}{suggest(key, slots)}')
      return slots[key]
    if not isinstance(node, Mapping):
      raise ValueError(f'{path}: {at} is the value {node!r}, there is nothing in it')
    return _Slot('plain')

  def _exchanged(self, node: Mapping, at: str, changes: Changes) -> dict:
    """The part that `changes` name here; it keeps the values of the old one (`node`) that fit."""
    fn = find(changes[f'{at}.name'], self.choices, f'{at}.name')
    if node.get('name') == name_of(fn):
      return dict(node)
    made = {}
    for knob, slot in _slots(fn).items():
      path = f'{at}.{knob}'
      if knob in node and slot.takes(node[knob]):
        made[knob] = node[knob]
      elif slot.kind == 'part' and f'{path}.name' in changes:
        made[knob] = slot._exchanged({}, path, changes)
      elif slot.kind == 'plain' and path in changes:
        made[knob] = slot.value(changes[path], None, path)
      elif slot.default is inspect.Parameter.empty:
        wanted = f'{path}.name' if slot.kind == 'part' else path
        raise ValueError(f'{at}: {name_of(fn)} needs {knob!r}; give --{wanted}=...')
    weight = {'weight': node['weight']} if 'weight' in node else {}
    return part(fn, **made).to_dict() | weight

  def takes(self, value: Any) -> bool:
    """Whether a value of another part can stay here."""
    if self.kind == 'plain':
      if typing.get_origin(self.hint) is typing.Literal:
        return value in typing.get_args(self.hint)
      types = {type(value), type(self.default)}
      return self.default is inspect.Parameter.empty or len(types) == 1 or types == {int, float}
    parts = [value] if self.kind == 'part' else value.values()
    return all(one['name'] in self.choices or ':' in one['name'] for one in parts)

  def value(self, text: str, now: Any, path: str) -> Any:
    """The text as a value of the type of the default; without one, of the hint or of the value `now`."""
    kind = type(self.default)
    if self.default is inspect.Parameter.empty:
      kind = self.hint if isinstance(self.hint, type) else type(now)
    if kind in (bool, type(None)) and text.lower() in ('true', 'false'):
      return text.lower() == 'true'
    if kind is bool and text.lower() in ('true', '1', 'false', '0'):
      return text.lower() in ('true', '1')
    try:
      if kind in (int, float, str):
        return kind(text)
      found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      found = text
    found = tuple(found) if kind is tuple and isinstance(found, list) else found
    if not isinstance(found, kind) and kind is not type(None):
      raise ValueError(f'{path}: expected {kind.__name__}, got {text!r}')
    return found


def _slots(fn: typing.Callable) -> dict[str, _Slot]:
  """The slots of a function or dataclass: its knobs."""
  hints = typing.get_type_hints(fn, include_extras=True)
  return {
    knob: _slot(hints.get(knob), parameter.default) for knob, parameter in knobs_of(fn).items()
  }


def _slot(hint: Any, default: Any) -> _Slot:
  for kind, one in (('part', hint), ('parts', several_of(hint))):
    table = table_of(one)
    if table is not None:
      return _Slot(kind, table, default=default)
  return _Slot('plain', hint=plain(hint), default=default)
