"""The commands of docs/tools.md make runs, and its file of tools works."""

import json
import pathlib
import re
import shlex

import pytest

from polgrad import environments
from polgrad.environments import Tools
from polgrad.environments.workers import Pool
from polgrad.options import from_text
from polgrad.registry import bind

PAGE = (pathlib.Path(__file__).parents[1] / 'docs' / 'tools.md').read_text()
COMMANDS = re.findall(r'^python -m polgrad.train [^`]*?--workdir=\S+', PAGE, re.MULTILINE)
FILE = re.search(r'```python\n(.*?)```', PAGE, re.DOTALL)[1]


@pytest.fixture
def files(tmp_path, monkeypatch, smollm2):
  """The files that the page names, in the working directory."""
  monkeypatch.chdir(tmp_path)
  lines = [{'prompt': f'{i} bags of {i} nuts. How many?', 'answer': str(i * i)} for i in range(20)]
  (tmp_path / 'problems.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  (tmp_path / 'notes.jsonl').write_text('{"text": "A bag of nuts."}')
  (tmp_path / 'tools.py').write_text(FILE)
  return smollm2


def test_the_commands_make_runs(files):
  assert len(COMMANDS) == 5
  record = {'id': 0, 'messages': [{'role': 'user', 'content': 'a'}]}
  for command in COMMANDS:
    (config,) = [word for word in shlex.split(command) if word.startswith('--config=')]
    text = config.partition(':')[2].replace('model=smollm2', f'model=smollm2,path={files}')
    settings = from_text(text).phases.train.collect
    tools = bind(settings.environment, environments.TABLE)
    assert isinstance(tools, Tools) and Pool(tools).environment is tools
    assert tools.opened(record)['messages'][0]['role'] == 'system'
    if tools.form == 'inline':
      assert tuple(settings.stop_strings) == (tools.marks[1],)


def test_the_file_of_the_page_has_a_tool(files):
  scope = {'__name__': 'tools'}
  exec(FILE, scope)
  tools = scope['calendar']()
  call = '<tool_call>{"name": "weekday", "arguments": {"date": "%s"}}</tool_call>'
  said = [tools.step(0, call % date).observation[0]['content'] for date in ('2024-02-29', '1')]
  assert said == ['Thursday', "error: Invalid isoformat string: '1'"]
  assert tools.schemas[0]['function']['parameters']['properties']['date'] == {
    'type': 'string',
    'description': 'as YYYY-MM-DD.',
  }
