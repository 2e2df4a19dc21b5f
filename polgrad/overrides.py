"""Values of a configuration that a command line changes, and parts that it exchanges.

    apply(config, {'config.phases.train.optimizer.schedule.name': 'cosine',
                   'config.phases.train.optimizer.schedule.steps': '100'}, build.TABLE)

A path ends at a knob of a part, and its text becomes a value of the knob's type. `name` exchanges the
part: knobs that the old and the new part share keep their values, others that are not given get the
defaults of the new part. In a slot of several parts, a name that is not there adds a part. Names may be
short, as `cosine` for `optim.cosine`.
"""

import ast
import inspect
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from polgrad.registry import find, knobs_of, name_of, part, suggest

Changes = Mapping[str, str]  # path, from 'config' on, -> text


def apply(config: Mapping | ConfigDict, changes: Changes, choices: Mapping) -> ConfigDict:
  """The configuration with these changes.

  Args:
    config: what `registry.part` wrote.
    changes: texts by dotted path, such as 'config.seed'.
    choices: the table of the outermost part.

  Raises:
    ValueError: a path that leads nowhere, a name that its slot does not have, a text that is no value of
      the knob, or a part that needs more; the message names the path and the valid choices.
  """
  tree = ConfigDict(config).to_dict()
  # Outer parts are exchanged before what is in them is changed.
  for path in sorted(changes, key=lambda path: (path.count('.'), not path.endswith('.name'))):
    _, *keys = path.split('.')
    tree = _Slot('part', choices).changed(tree, keys, 'config', path, changes)
  return ConfigDict(tree)


class _Slot(NamedTuple):
  """What a place in a configuration holds: a part, several by name, or a plain value."""

  kind: str  # 'part', 'parts', 'plain'
  choices: Mapping = {}  # the table of the parts
  hint: Any = None  # of a plain value
  default: Any = inspect.Parameter.empty
  weighted: bool = False  # whether a part may have a weight, as one of several

  def changed(self, node: Any, keys: list[str], at: str, path: str, changes: Changes) -> Any:
    """The node with another value at `keys`; `at` is its own path, `path` the whole one."""
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
      raise ValueError(f'{at}: unknown {key!r}{suggest(key, node)}')
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
    """The part that `changes` name at this place, with what it can keep of the node."""
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
      types = {type(value), type(self.default)}
      return self.default is inspect.Parameter.empty or len(types) == 1 or types == {int, float}
    parts = [value] if self.kind == 'part' else value.values()
    return all(one['name'] in self.choices or ':' in one['name'] for one in parts)

  def value(self, text: str, now: Any, path: str) -> Any:
    """The text as a value of the type that the default has, the hint says, or the present value has."""
    kind = type(self.default)
    if self.default is inspect.Parameter.empty:
      kind = self.hint if isinstance(self.hint, type) else type(now)
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
  several = typing.get_args(hint)[-1:]
  for kind, one in [('part', hint), *(('parts', argument) for argument in several)]:
    table = getattr(one, '__metadata__', [None])[0]
    if isinstance(table, Mapping):
      return _Slot(kind, table, default=default)
  plain = getattr(hint, '__origin__', hint) if hasattr(hint, '__metadata__') else hint
  return _Slot('plain', hint=plain, default=default)
