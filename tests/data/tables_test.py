"""Data by name, by folder and by file; fields under other names; GSM8K and MATH."""

import importlib.util
import json
import pathlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from polgrad import build, identity, tasks
from polgrad.data import sources, tables
from polgrad.options import from_text
from polgrad.registry import bind
from polgrad.rewards import verifiers
from tests import buckets

ROWS = [
  {'prompt': '1+1', 'answer': 2, 'id': 'a'},
  {'prompt': 'naïve\u2028?', 'answer': 40, 'id': 'b'},
]
READ = [
  {'prompt': '1+1', 'answer': '2', 'record_id': 'a'},
  {'prompt': 'naïve\u2028?', 'answer': '40', 'record_id': 'b'},
]
# (question, what the last line says, right completion, wrong completion) in the layout of GSM8K
WORDS = [
  ('Ada has 3 bags of 4 nuts. How many nuts?', '12', 'It is 3*4.\n#### 12', '#### 13'),
  ('A train has 1,200 seats, 200 are taken. How many are free?', '1,000', '#### 1000', '#### 100'),
  ('Bo had 5 coins and lost 8 in debt. His balance?', '-3', r'\boxed{-3}', '#### 3'),
  ('Half of 7 metres?', '3.5', 'That is 3.5', '#### 35'),
  ('12 boxes of 1,000 screws. How many screws?', '12,000', '#### 12,000', '#### 12'),
]
# (problem, solution, right completion, wrong completion) in the layout of MATH
PROBLEMS = [
  ('Half of 1?', r'So $\boxed{\frac12}$.', r'$\boxed{\dfrac{1}{2}}$', '0.5'),
  ('Factor $x^2-1$.', r'\boxed{(x-1)(x+1)}', r'$\boxed{(x - 1)(x + 1)}$', r'\boxed{x^2-1}'),
  ('Height?', r'\boxed{\frac{\sqrt{3}}{2}}', r'\boxed{\frac{\sqrt3}{2}}', r'\boxed{2}'),
  ('Angle?', r'\boxed{90^\circ}', r'\boxed{90}', r'\boxed{60^\circ}'),
  ('Point?', r'\boxed{\left(3,\frac{\pi}{2}\right)}', r'\boxed{(3, \frac{\pi}{2})}', r'\boxed{3}'),
]


def write(path, rows):
  """The rows in the file format that the ending of the path names."""
  if path.suffix == '.parquet':
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
  elif path.suffix == '.jsonl':
    path.write_text(''.join(json.dumps(row) + '\n\n' for row in rows))
  elif path.suffix == '.json':
    path.write_text(json.dumps(rows))
  else:
    cells = [list(rows[0]), *(row.values() for row in rows)]
    path.write_text('\n'.join(','.join(map(str, line)) for line in cells), encoding='utf-8')
  return str(path)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
  """No network, and a cache of this test alone."""
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')


@pytest.mark.parametrize('ending', ['parquet', 'json', 'jsonl', 'csv'])
def test_a_file_is_read_as_it_is(tmp_path, ending):
  path = write(tmp_path / f'rows.{ending}', ROWS)
  source = sources.hub(path=path)
  assert list(source) == READ and source.irregular and not source.fingerprint


def test_what_csv_holds_stays_text(tmp_path):
  file = tmp_path / 'rows.csv'
  file.write_text('\ufeffprompt,answer\n"two, ""three""\nlines",007\n1.10,NA\n', encoding='utf-8')
  assert list(sources.hub(path=str(file))) == [
    {'prompt': 'two, "three"\nlines', 'answer': '007'},
    {'prompt': '1.10', 'answer': 'NA'},
  ]


def test_a_folder_is_read_by_datasets_whether_saved_or_of_files(tmp_path):
  data = datasets.DatasetDict(
    {
      'train': datasets.Dataset.from_list(ROWS),
      'test': datasets.Dataset.from_list(ROWS[1:]),
    }
  )
  data.save_to_disk(str(tmp_path / 'saved'))
  data['train'].save_to_disk(str(tmp_path / 'one'))
  (tmp_path / 'files').mkdir()
  for split, rows in data.items():
    rows.to_parquet(str(tmp_path / 'files' / f'{split}.parquet'))
  read = lambda folder, split: list(sources.hub(path=str(tmp_path / folder), split=split))
  assert read('saved', 'train') == read('one', 'train') == read('files', 'train') == READ
  assert read('saved', 'test') == read('files', 'test') == read('files', 'train[1:]') == READ[1:]
  for folder, split in (('saved', 'dev'), ('one', 'test'), ('files', 'dev')):
    with pytest.raises(ValueError, match=rf'{folder}/{split}: .*{split}'):
      read(folder, split)


def test_a_table_has_none_where_a_record_has_no_field(tmp_path):
  talk = [
    {'role': 'user', 'content': 'hi'},
    {'role': 'assistant', 'content': 'yes', 'tool_calls': []},
  ]
  rows = [
    {'messages': talk[:1], 'answer': 'a', 'tools': None},
    {'messages': talk, 'tools': '[{"name": "f"}]'},
  ]
  first, second = sources.hub(path=write(tmp_path / 'rows.parquet', rows))
  assert first == {'messages': talk[:1], 'answer': 'a'}
  assert second == {'messages': talk, 'tools': [{'name': 'f'}]}


def test_values_of_numpy_and_arrow_become_those_of_python():
  value = {'a': np.array([1, 2]), 'b': np.float64(0.5), 'c': pa.scalar({'d': [None, 1]}), 'e': None}
  got = tables.plain(value)
  assert got == {'a': [1, 2], 'b': 0.5, 'c': {'d': [None, 1]}}
  assert type(got['b']) is float and type(got['a'][0]) is int


def test_a_malformed_row_is_named_by_file_and_row(tmp_path):
  path = write(tmp_path / 'rows.parquet', [*ROWS, {'prompt': '1', 'answer': None, 'id': 'c'}])
  bad = write(tmp_path / 'bad.parquet', [{'prompt': 'a'}, {'prompt': None}])
  assert sources.hub(path=path)[2] == {'prompt': '1', 'record_id': 'c'}
  with pytest.raises(ValueError, match=r'bad.parquet:2: expected either prompt or messages'):
    sources.hub(path=bad)[1]


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json'])
def test_a_malformed_line_is_named_by_its_number_where_lines_are_blank(tmp_path, name):
  (tmp_path / name).write_text('\n{"prompt": "a"}\n\n{"prompt": "\\ud800"}\n')
  source = sources.hub(path=str(tmp_path / name))
  assert source[0] == {'prompt': 'a'} and source.place(1) == f'{tmp_path}/{name}:4'
  with pytest.raises(ValueError, match=f'{name}:4: .*surrogates not allowed'):
    source[1]


@pytest.mark.parametrize(
  ('name', 'text', 'why'),
  [
    ('a.jsonl', '{"prompt": "a"}\n{', 'a.jsonl:2: '),
    ('a.csv', 'prompt,answer\n1\n', 'a.csv: row 1 has 1 values, but there are 2 columns'),
    ('a.csv', '', 'a.csv: no records'),
    ('a.parquet', 'PAR1', 'a.parquet: '),
    ('a.json', '[', 'a.json: '),
    ('a.txt', 'x', r'a.txt: unknown kind of file; valid: .parquet, .csv'),
  ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, why):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=why):
    sources.hub(path=str(tmp_path / name))


@pytest.mark.parametrize('ending', ['parquet', 'json', 'jsonl', 'csv'])
def test_files_of_a_bucket_are_read_and_belong_to_the_identity_of_a_run(
  tmp_path, monkeypatch, ending
):
  buckets.use(monkeypatch, tmp_path)
  path = f'gs://bucket/rows.{ending}'
  write(tmp_path / f'rows.{ending}', [{'prompt': '1+1', 'answer': '2'}] * 8)
  task = 'jsonl' if ending == 'jsonl' else 'hub'
  config = from_text(f'method=sft,task={task},data={path},model=tiny,smoke')
  assert build.build(config).phases['train'].source[0] == {'prompt': '1+1', 'answer': '2'}
  before = identity.describe(config)
  write(tmp_path / f'rows.{ending}', [{'prompt': '1+1', 'answer': '3'}] * 8)
  changed = identity.differences(before, identity.describe(config))
  assert changed == [f'{path}: other contents than before']
  with pytest.raises(FileNotFoundError, match=r'gs://bucket/no.jsonl'):
    from_text(f'method=sft,task={task},data=gs://bucket/no.jsonl,model=tiny,smoke')


def test_a_name_that_cannot_be_reached_and_a_missing_file_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'nobody/nothing: no file or folder .* of the hub'):
    sources.hub(path='nobody/nothing')
  with pytest.raises(FileNotFoundError, match=r'x.parquet: there is no such file'):
    sources.hub(path=str(tmp_path / 'x.parquet'))
  with pytest.raises(FileNotFoundError, match='the folder has no data files'):
    sources.hub(path=str(tmp_path))
  with pytest.raises(ValueError, match=r"a file has the split train alone.*split='test'"):
    sources.hub(path=write(tmp_path / 'a.jsonl', ROWS), split='test')


def test_without_datasets_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
  with pytest.raises(ImportError, match=r'pip install "polgrad\[hub\]"'):
    sources.hub(path='openai/gsm8k')


def test_data_of_the_hub_that_changed_are_another_run(tmp_path, monkeypatch):
  asked = []

  def load(path, subset, *, split, revision):
    asked.append((path, subset, split, revision))
    return datasets.Dataset.from_list(ROWS * 5)

  monkeypatch.setattr(datasets, 'load_dataset', load)
  data = 'task=hub,data=some/sums,subset=main,revision=v1'
  config = from_text(f'method=sft,{data},model=tiny,smoke')
  first, other = build.build(config), build.build(config)
  assert asked[0] == ('some/sums', 'main', 'train', 'v1')
  object.__setattr__(other.phases['train'].source, 'fingerprint', 'changed')
  one, two = (identity.describe(config, build.fingerprints(run)) for run in (first, other))
  assert (
    identity.differences(one, two)[-1] == 'config.phases.train.source: other contents than before'
  )
  assert [k for k in one['files'] if k.endswith('.source')] == ['config.phases.train.source']


@pytest.mark.parametrize('ending', ['parquet', 'json', 'csv'])
def test_a_file_of_a_table_that_changed_is_another_run(tmp_path, ending):
  file = tmp_path / f'rows.{ending}'
  make = lambda rows: from_text(f'method=sft,task=hub,data={write(file, rows)},model=tiny,smoke')
  sums = [{'prompt': '1+1', 'answer': '2'}] * 8
  before = identity.describe(make(sums))
  assert identity.differences(before, identity.describe(make(sums))) == []
  assert f'{file}: other contents than before' in identity.differences(
    before, identity.describe(make([*sums[1:], {'prompt': '1+2', 'answer': '3'}]))
  )


@pytest.mark.parametrize('task', ['jsonl', 'hub'])
def test_fields_get_other_names_from_the_command_line(tmp_path, task):
  rows = [{'problem': '1+1', 'messages': 'x', 'solution': '2', 'answer': 'no', 'level': '3'}] * 8
  path = write(tmp_path / 'rows.jsonl', rows)
  text = f'method=sft,task={task},data={path},model=tiny,smoke'
  names = 'fields.prompt=problem,fields.answer=solution,fields.messages=,fields.twice=solution'
  source = build.build(from_text(f'{text},{names}')).phases['train'].source
  assert source[0] == {'prompt': '1+1', 'answer': '2', 'level': '3', 'twice': '2'}
  with pytest.raises(ValueError, match=r"rows.jsonl:1: fields.prompt=problme: .*mean 'problem'"):
    from_text(f'{text},fields.prompt=problme')
  with pytest.raises(ValueError, match=r"\['prompt'\] of fields: task=addition reads no data"):
    from_text('method=sft,task=addition,model=tiny,fields.prompt=a')


@pytest.mark.parametrize(
  ('record', 'messages'),
  [
    ({'system': 's', 'conversations': [{'from': 'human', 'value': 'q'}]}, ['s', 'q']),
    ({'system': None, 'messages': [{'role': 'user', 'content': 'q'}]}, ['q']),
    ({'system': 's', 'prompt': 'q'}, ['s', 'q']),
    ({'prompt': 'q'}, ['of the task', 'q']),
  ],
)
def test_a_records_own_system_text_comes_first(tmp_path, record, messages):
  path = write(tmp_path / 'rows.jsonl', [record])
  got = sources.as_chat(
    source=sources.jsonl(path=path), system='' if len(messages) < 2 else 'of the task'
  )
  assert [turn['content'] for turn in got[0]['messages']] == messages
  assert 'system' not in got[0]


def test_two_system_turns_in_one_record_are_refused(tmp_path):
  turns = [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': 'b'}]
  path = write(tmp_path / 'rows.jsonl', [{'system': 's', 'messages': turns}])
  with pytest.raises(ValueError, match=r'rows.jsonl:1: both the field system and the messages'):
    sources.jsonl(path=path)


def judged(task):
  """Records and the verifier of a task."""
  return bind(task.problems, sources.TABLE), bind(task.rewards['correct'], verifiers.TABLE).fn


@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
def test_gsm8k_asks_for_a_number_after_the_mark_and_judges_it(tmp_path, ending):
  rows = [{'question': q, 'answer': f'x = <<1+1=2>>2.\n#### {n}'} for q, n, *_ in WORDS]
  task = tasks.gsm8k(data=write(tmp_path / f'rows.{ending}', rows), holdout=0.0)
  source, verify = judged(task)
  assert '####' in task.system and 'demonstrations' in task.has
  for record, (question, number, right, wrong) in zip(source, WORDS, strict=True):
    assert record == {'prompt': question, 'answer': f'x = 2.\n#### {number}'}
    assert [verify(text, record) for text in (record['answer'], right, wrong)] == [1, 1, 0]


@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
def test_math_asks_for_a_box_and_judges_it(tmp_path, ending):
  rows = [{'problem': p, 'solution': s, 'type': 'Algebra'} for p, s, *_ in PROBLEMS]
  task = tasks.math(data=write(tmp_path / f'rows.{ending}', rows), holdout=0.0)
  source, verify = judged(task)
  assert 'boxed' in task.system and 'demonstrations' in task.has
  for record, (problem, solution, right, wrong) in zip(source, PROBLEMS, strict=True):
    assert record == {'prompt': problem, 'answer': solution, 'type': 'Algebra'}
    assert [verify(text, record) for text in (solution, right, wrong)] == [1, 1, 0]


def test_held_out_problems_are_a_fraction_or_a_split_or_a_file(tmp_path):
  path = write(tmp_path / 'a.jsonl', ROWS * 10)
  other = write(tmp_path / 'b.jsonl', ROWS)
  count = lambda **options: [
    len(bind(part, sources.TABLE)) if part else 0
    for task in [tasks.hub(data=path, reward='numeric_answer', **options)]
    for part in (task.problems, task.held_out)
  ]
  assert count() == [18, 2] and count(holdout=0.0) == [20, 0] and count(held_out=other) == [20, 2]


def test_math_problems_that_a_package_ships_are_a_task():
  package = pathlib.Path(importlib.util.find_spec('lm_eval').origin).parent
  path = package / 'tasks/score/math/to_be_fixed_questions.json'
  source, verify = judged(tasks.math(data=str(path), fields={'answer': 'answer'}, holdout=0.0))
  assert len(source) == 11
  for record in source:
    assert record['record_id'].startswith('test/') and record['prompt']
    assert verify(rf'Thus $\boxed{{{record["answer"]}}}$.', record) == 1


def test_boxes_are_found_in_linear_time():
  record = {'answer': '1'}
  verify = verifiers.boxed_answer
  assert verify(r'\boxed{' * 100_000 + '1' + '}' * 100_000, record) == 0
  assert verify('{' * 500_000 + r'\boxed{1', record) == 0
  with pytest.raises(ValueError, match='no answer'):
    verify('1', {'answer': ''})
