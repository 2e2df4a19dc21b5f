"""Runs as text: `method=dapo,task=chain_sum,model=smollm2,path=~/smollm2,steps=30`.

An option belongs to whoever has an argument of its name: the run (`compose.compose`), the function of
the method, of the task or of the model, or a field of `Task`. A name that has two owners is refused,
and so is one that has none. `environment=NAME` (or `file.py:Class`) is what answers the turns of the
policy, in any task, and `environment.KNOB=...` are its settings. `curriculum=NAME` and
`curriculum.KNOB=...` say in the same way which records a step draws.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from polgrad import curricula, environments, methods, presets, tasks
from polgrad.compose import SMOKE, compose
from polgrad.methods.base import BUDGETS
from polgrad.registry import check_ranges, find, part, plain, suggest
from polgrad.tasks import Task

CHOICES = ('method', 'task', 'model')
SIMPLE = (int, float, bool, str, tuple)


def from_text(text: str, **defaults: str) -> ConfigDict:
  """The configuration of a run.

  Args:
    text: `name=value` pairs with commas between them; a name alone means true. Several texts of one
      option have + between them.
    defaults: further pairs, for names that the text does not give.

  Raises:
    ValueError: an unknown method, task, model or option, or a value of another type; the message
      lists the valid ones and suggests a near one.
  """
  given = {name: str(value) for name, value in defaults.items()} | parse(text)
  if 'smoke' in given and 'steps' in given:
    raise ValueError(
      f'options smoke and steps: a smoke run makes {SMOKE["steps"]} steps; leave one of them out'
    )
  # Choose the functions of method, task and model.
  for name in CHOICES:
    if name not in given:
      raise ValueError(f'{name}=... is missing; valid: {sorted(_tables()[name])}')
  method, model = (_choose(kind, given.pop(kind)) for kind in ('method', 'model'))
  task_name = given.pop('task')
  template_options = _taken(given, 'template')
  environment, environment_knobs = given.pop('environment', ''), _taken(given, 'environment')
  curriculum = _curriculum(given.pop('curriculum', ''), _taken(given, 'curriculum'))
  task, rest = _task_function(task_name, given)

  # Give every other option to the function that has an argument of its name.
  owners = {
    'run': _knobs(compose),
    'method': {k: v for k, v in _knobs(method).items() if k not in BUDGETS},
    'task': _knobs(task),
    'model': {k: v for k, v in _knobs(model).items() if k != 'alphabet'},
  }
  values = _assign(rest, owners)
  for name, parameter in inspect.signature(task).parameters.items():
    if parameter.default is inspect.Parameter.empty and name not in values['task']:
      raise ValueError(f'task={task_name} needs {name}=...')

  # Call them; tasks and models check their numbers themselves. A model of characters takes its alphabet
  # from the task.
  check_ranges(method, values['method'], 'method')
  fields = values.pop('fields')
  made = dataclasses.replace(task(**values['task']), **fields)
  made = _with_environment(made, environment, environment_knobs)
  if 'alphabet' in _knobs(model):
    values['model']['alphabet'] = made.alphabet
  preset = _with_template(model(**values['model']), template_options)
  return compose(
    functools.partial(method, **values['method']),
    made,
    preset,
    curriculum=curriculum,
    **values['run'],
  )


def parse(text: str) -> dict[str, str]:
  """`a=1,b` -> {'a': '1', 'b': 'true'}.

  Raises:
    ValueError: a name that occurs twice.
  """
  items = [item.partition('=') for item in text.split(',') if item]
  pairs = [(name.strip(), value.strip() if equals else 'true') for name, equals, value in items]
  for name, _ in pairs:
    if [n for n, _ in pairs].count(name) > 1:
      raise ValueError(f'option {name} is given twice')
  return dict(pairs)


def values(text: str, **defaults: Any) -> ConfigDict:
  """Options of a named run: `values(text, seed=0, smoke=False)` reads `seed=3,smoke`.

  Raises:
    ValueError: an option without a default, or a value of another type.
  """
  given = parse(text)
  for name in given:
    if name not in defaults:
      raise ValueError(f'unknown option {name!r}{suggest(name, defaults)}')
  return ConfigDict(
    {k: convert(k, given[k], type(v)) if k in given else v for k, v in defaults.items()}
  )


def convert(name: str, text: str, kind: type) -> Any:
  """The value of an option.

  Raises:
    ValueError: the text is no value of this type.
  """
  if kind is bool:
    if text.lower() not in ('true', 'false', '1', '0'):
      raise ValueError(f'option {name}: expected true or false, got {text!r}')
    return text.lower() in ('true', '1')
  if _choices(kind):
    if text not in _choices(kind):
      raise ValueError(f'option {name}: unknown {text!r}{suggest(text, _choices(kind))}')
    return text
  if kind is tuple:  # texts with + between them
    return tuple(one for one in text.split('+') if one)
  try:
    return kind(text)
  except ValueError as error:
    raise ValueError(f'option {name}: expected {kind.__name__}, got {text!r}') from error


def _tables() -> dict[str, Mapping[str, Callable]]:
  return {'method': methods.TABLE, 'task': tasks.TABLE, 'model': presets.TABLE}


def _choose(kind: str, name: str) -> Callable:
  table = _tables()[kind]
  if name not in table:
    raise ValueError(f'option {kind}: unknown {name!r}{suggest(name, table)}')
  return table[name]


def _task_function(name: str, given: Mapping[str, str]) -> tuple[Callable, dict[str, str]]:
  """The task's function and the options that are left; other names are tasks of reasoning-gym.

  Options that are settings of a reasoning-gym task, `reward.tolerance=...`, and `fields.prompt=...` are
  put together.
  """
  rest = dict(given)
  knobs, names = _taken(rest, 'reward'), _taken(rest, 'fields')
  if name in tasks.TABLE:
    function, fixed = tasks.TABLE[name], {}
    has = inspect.signature(function).parameters
    if knobs:
      if 'reward_options' not in has:
        raise ValueError(f'options {sorted(knobs)} of the reward: task={name} has its own reward')
      fixed['reward_options'] = {k: _number(v) for k, v in knobs.items()}
    if names:
      if 'fields' not in has:
        raise ValueError(f'options {sorted(names)} of fields: task={name} reads no data of yours')
      fixed['fields'] = names
    return (_with(function, **fixed) if fixed else function), rest
  gym = tasks.gym_settings(name)
  if gym is None:
    known = [*tasks.TABLE, *tasks.gym_names()]
    raise ValueError(f'option task: unknown {name!r}{suggest(name, known)}')
  options = {k: _number(rest.pop(k)) for k in list(rest) if k in gym}
  return _with(tasks.reasoning_gym, task=name, options=options), rest


def _with_template(preset: presets.Preset, options: Mapping[str, str]) -> presets.Preset:
  """The model, whose chat template reads these options: `template.enable_thinking=false`."""
  if not options:
    return preset
  if 'template_options' not in preset.tokenizer:
    raise ValueError(f'options {sorted(options)} of the template: the model has no chat template')
  tokenizer = preset.tokenizer.to_dict()
  tokenizer['template_options'] = {name: _number(text) for name, text in options.items()}
  return dataclasses.replace(preset, tokenizer=ConfigDict(tokenizer))


def _with_environment(task: Task, name: str, knobs: Mapping[str, str]) -> Task:
  """The task with another environment, or with other settings: `environment.max_turns=3`."""
  if not (name or knobs):
    return task
  before = {} if name or task.environment is None else task.environment.to_dict()
  name = name or before.pop('name', '')
  if not name:
    raise ValueError(f'options {sorted(knobs)} of an environment: name it with environment=...')
  made = find(name, environments.TABLE, 'option environment')
  kinds = {k: plain(hint) for k, hint in typing.get_type_hints(made, include_extras=True).items()}
  given = {
    k: convert(f'environment.{k}', text, kinds[k]) if kinds.get(k) in SIMPLE else text
    for k, text in knobs.items()
  }
  return dataclasses.replace(task, environment=part(made, **before | given))


def _curriculum(name: str, knobs: Mapping[str, str]) -> ConfigDict | None:
  """The curriculum of this name: `curriculum=vade,curriculum.decay=0.8`; None if none is named."""
  if not name:
    if knobs:
      raise ValueError(f'options {sorted(knobs)} of a curriculum: name it with curriculum=...')
    return None
  made = find(name, curricula.TABLE, 'option curriculum')
  kinds = {k: plain(hint) for k, hint in typing.get_type_hints(made, include_extras=True).items()}
  given = {}
  for knob, text in knobs.items():
    # Entries of a mapping: `curriculum.weights.easy=2`.
    head, _, key = knob.partition('.')
    if key:
      given.setdefault(head, {})[key] = _number(text)
    elif kinds.get(knob) in SIMPLE:
      given[knob] = convert(f'curriculum.{knob}', text, kinds[knob])
    else:
      given[knob] = text
  return part(made, **given)


def _taken(given: dict[str, str], prefix: str) -> dict[str, str]:
  """Takes the options `prefix.NAME` out of the others, by NAME."""
  names = [name for name in given if name.startswith(f'{prefix}.')]
  return {name.partition('.')[2]: given.pop(name) for name in names}


def _with(function: Callable, **fixed: Any) -> Callable:
  """The function with some arguments given, which are then no options any more."""

  def call(**others: Any) -> Any:
    return function(**fixed, **others)

  parameters = [p for n, p in inspect.signature(function).parameters.items() if n not in fixed]
  call.__signature__ = inspect.Signature(parameters)
  return call


def _number(text: str) -> int | float | str:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  return {'true': True, 'false': False}.get(text.lower(), text)


def _choices(kind: Any) -> tuple[str, ...]:
  """The texts of a `Literal`; () of any other type."""
  return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _knobs(function: Callable) -> dict[str, type]:
  """Arguments by keyword that a text can give, with their types."""
  parameters = inspect.signature(function).parameters.values()
  return {
    p.name: plain(p.annotation)
    for p in parameters
    if p.kind is inspect.Parameter.KEYWORD_ONLY
    and (plain(p.annotation) in SIMPLE or _choices(p.annotation))
  }


def _assign(given: Mapping[str, str], owners: Mapping[str, Mapping[str, type]]) -> dict[str, dict]:
  """The options of each owner, converted; `fields` are those of `Task` itself."""
  fields = {f.name: plain(f.type) for f in dataclasses.fields(Task) if plain(f.type) in SIMPLE}
  values = {name: {} for name in (*owners, 'fields')}
  for name, text in given.items():
    found = [owner for owner, knobs in owners.items() if name in knobs]
    if len(found) > 1:
      raise ValueError(f'option {name}: both the {found[0]} and the {found[1]} have it')
    if found:
      values[found[0]][name] = convert(name, text, owners[found[0]][name])
    elif name in fields:
      values['fields'][name] = convert(name, text, fields[name])
    else:
      valid = {
        *CHOICES,
        'environment',
        'curriculum',
        *fields,
        *(n for knobs in owners.values() for n in knobs),
      }
      raise ValueError(f'unknown option {name!r}{suggest(name, valid)}')
  return values
