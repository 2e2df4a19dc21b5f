"""Environments of the package verifiers as objects, and their data sets."""

import functools
import json
import signal
import threading
from typing import Any
from unittest import mock

from polgrad.registry import find

MISSING = 'verifiers is not installed: pip install "polgrad[verifiers]"'
CLASSIC = 'this version of verifiers has no MultiTurnEnv: pip install "polgrad[verifiers]"'
LOADING = threading.Lock()


def load(name: str, options: dict) -> Any:
  """An environment of the package verifiers; the same object for the same arguments.

  Args:
    name: of an installed package of an environment, or `file.py:function` for a function of your own.
    options: arguments of its `load_environment`, or of your function.

  Raises:
    ImportError: the package verifiers is missing, or too new or too old for its classic environments.
    ValueError: the environment cannot be loaded, or what it makes is none of a conversation.
  """
  with LOADING:
    return _load(name, json.dumps(options, sort_keys=True))


@functools.cache
def _load(name: str, options: str) -> Any:
  try:
    import verifiers
  except ImportError as error:
    raise ImportError(MISSING) from error
  if not hasattr(verifiers, 'MultiTurnEnv'):
    raise ImportError(CLASSIC)
  make = functools.partial(verifiers.load_environment, name)
  if ':' in name:
    make = find(name, {}, 'environment of verifiers')
  try:
    # Its environments would take SIGTERM and SIGINT for themselves. A run needs both.
    with mock.patch.object(signal, 'signal', lambda *_: None):
      made = make(**json.loads(options))
  except Exception as error:  # whatever the code of an environment raises
    raise ValueError(
      f'environment {name!r} of verifiers: {type(error).__name__}: {error}'
    ) from error
  if not isinstance(made, verifiers.MultiTurnEnv):
    raise ValueError(
      f'environment {name!r}: expected a verifiers.MultiTurnEnv, got {type(made).__name__}'
    )
  if made.requires_group_rollouts:
    raise ValueError(
      f'environment {name!r} has rewards that compare the rollouts of a group; here each row is judged '
      'alone'
    )
  return made


def records(name: str, options: dict, split: str) -> tuple[int, Any]:
  """The number of rows of the data set, and the function from row to record.

  A record has the prompt as `messages` (or as `prompt`, if it is a text), the `tools`, the `answer` if
  there is one, and the whole row as `verifiers_row`.
  """
  environment = load(name, options)
  splits = {'train': environment.get_dataset, 'eval': environment.get_eval_dataset}
  if split not in splits:
    raise ValueError(f'split {split!r}; valid: {sorted(splits)}')
  rows = splits[split]()

  def record(i: int) -> dict:
    row = rows[i]
    if isinstance(row.get('info'), str):
      row['info'] = json.loads(row['info'])
    prompt = row['prompt']
    made = {'prompt': prompt} if isinstance(prompt, str) else {'messages': _turns(prompt)}
    tools = (row.get('info') or {}).get('tool_defs') or environment.tool_defs or []
    if tools:
      made['tools'] = [_function(tool) for tool in tools]
    if isinstance(row.get('answer'), str) and row['answer']:
      made['answer'] = row['answer']
    return {**made, 'verifiers_row': row}

  return len(rows), record


def _turns(prompt: Any) -> list[dict]:
  """Messages without the fields that a data set fills with None."""
  return [{k: v for k, v in dict(turn).items() if v is not None} for turn in prompt]


def _function(tool: Any) -> dict:
  """A tool as chat templates read it."""
  fields = tool if isinstance(tool, dict) else tool.model_dump()
  kept = {name: fields[name] for name in ('name', 'description', 'parameters')}
  return {'type': 'function', 'function': kept}
