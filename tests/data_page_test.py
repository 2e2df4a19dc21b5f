"""What docs/data.md shows works as written."""

import json
import pathlib
import re
import shlex

import pytest

from polgrad import build, cli
from polgrad.data import sources
from polgrad.options import from_text
from polgrad.overrides import apply
from tests import hub
from tests.data.chat_test import SWITCHED
from tests.data.tables_test import write

PAGE = (pathlib.Path(__file__).parent.parent / 'docs/data.md').read_text()
COMMANDS = re.findall(r'^python -m polgrad.train (.*)$', PAGE, re.MULTILINE)
[VERIFIER] = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
TURNS = [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
FORMS = [
  {'question': '2+2?', 'answer': 4},
  {'prompt': TURNS[:1], 'completion': TURNS[1:]},
  {
    'system': 's',
    'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}],
  },
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder that the commands run in, with the files that they name."""
  write(tmp_path / 'problems.jsonl', [{'prompt': '2+2?', 'answer': '4'}] * 80)
  write(tmp_path / 'problems.parquet', [{'prompt': '2+2?', 'answer': 4}] * 80)
  write(tmp_path / 'gsm8k.parquet', [{'question': '2+2?', 'answer': 'So\n#### 4'}] * 80)
  pair, label = {'chosen': '4', 'rejected': '5'}, {'completion': '4', 'label': True}
  listed = {'completions': ['4', '5', '6'], 'rewards': [1, 0, 0.5]}
  for name, fields in (('pairs', pair), ('labels', label), ('lists', listed)):
    write(tmp_path / f'{name}.jsonl', [{'prompt': '2+2?', **fields}] * 80)
  maths = {'problem': '2+2?', 'solution': r'So \boxed{4}', 'short': '4'}
  write(tmp_path / 'math.jsonl', [maths] * 80)
  pair = {'prompt': '2+2?', 'chosen': '4', 'rejected': '5', 'similarity': 0.9}
  write(tmp_path / 'similar.jsonl', [pair] * 80)
  weighted = {'prompt': '2+2?', **label, 'density_ratio': 0.7}
  write(tmp_path / 'weighted.jsonl', [weighted] * 80)
  related = {'prompt': 'a cat', 'query': 'an animal', 'negatives': ['a car']}
  write(tmp_path / 'texts.jsonl', [related] * 80)
  write(tmp_path / 'sheet.csv', [{'problem': '2+2?', 'result': 4}] * 80)
  (tmp_path / 'short.py').write_text(VERIFIER)
  path = hub.published('qwen3', tmp_path)
  (tmp_path / 'chat_template.jinja').write_text(SWITCHED)
  for name in ('QWEN3', 'SMOLLM2'):  # a small vocabulary is read quickly
    monkeypatch.setenv(f'POLGRAD_{name}', path)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_the_commands_compose_and_read_their_data(folder):
  assert len(COMMANDS) == 21
  for command in COMMANDS:
    [config, *_], changes = cli.split_changes(shlex.split(command))
    made = from_text(config.partition('run.py:')[2] + ',smoke')
    made = apply(made, changes, build.TABLE)
    run = build.build(made)
    rows = len(run.phases['train'].source) // (2 if 'kto,task=jsonl,data=pairs' in command else 1)
    assert 72 <= rows <= 80
    if 'unusable=drop' in command:
      assert run.phases['train'].collect.unusable == 'drop'


def test_the_forms_of_records_are_read(tmp_path):
  for record in FORMS:
    [read] = sources.jsonl(path=write(tmp_path / 'rows.jsonl', [record]))
    assert 'prompt' in read or 'messages' in read
  for message in re.findall(r'`(\[\{.*?\}[^`]*\])`', PAGE):
    assert json.loads(message.replace(', ...', ''))
