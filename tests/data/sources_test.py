"""Sources: every problem once, every malformed row named."""

import builtins
import dataclasses
import gzip
import json
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from polgrad.data import sources
from polgrad.registry import Weighted, bind, part


def read(path, *lines):
  path.write_text('\n'.join(lines), encoding='utf-8')
  return sources.jsonl(path=str(path))


@pytest.mark.parametrize('operator', ['+', '-', '*'])
@pytest.mark.parametrize(('digits', 'problems'), [(1, 100), (2, 8100)])
def test_arithmetic_splits_are_disjoint_complete_and_right(operator, digits, problems):
  splits = [
    list(sources.arithmetic(digits=digits, operator=operator, split=s))
    for s in ('train', 'heldout')
  ]
  prompts = [{r['prompt'] for r in split} for split in splits]
  assert not prompts[0] & prompts[1]
  assert len(prompts[0] | prompts[1]) == sum(map(len, splits)) == problems
  assert len(splits[1]) == problems // 10
  for record in splits[1]:
    a, sign, b = re.fullmatch(r'(\d+)([-+*])(\d+)=', record['prompt']).groups()
    assert len(a) == len(b) == digits
    expected = {'+': int(a) + int(b), '-': int(a) - int(b), '*': int(a) * int(b)}[sign]
    assert sign == operator and record['answer'] == str(expected)


def test_arithmetic_depends_on_the_seed_alone():
  assert list(sources.arithmetic(digits=1)) == list(sources.arithmetic(digits=1))
  assert list(sources.arithmetic(digits=1)) != list(sources.arithmetic(digits=1, seed=1))


def test_a_mixture_has_the_records_of_its_sources_in_turn_with_their_names():
  small, large = sources.arithmetic(digits=1), sources.seeds(size=3)
  mixed = sources.mixture(sources={'sums': small, 'seeds': large})
  assert len(mixed) == len(small) + 3
  assert mixed[0] == {**small[0], 'category': 'sums'}
  assert mixed[5] == {'prompt': '', 'seed': 2, 'category': 'seeds'}
  assert [mixed[i] for i in range(6, 93)] == [
    {**small[i], 'category': 'sums'} for i in range(3, 90)
  ]
  assert mixed.place(5) == 'seeds, row 2'
  assert len(sources.mixture(sources={'sums': small, 'seeds': large}, most=5)) == 8
  with pytest.raises(ValueError, match='belong to the curriculum'):
    sources.mixture(sources={'sums': Weighted(2.0, small)})


def test_arithmetic_of_long_numbers_is_never_listed():
  source = sources.arithmetic(digits=6)
  assert len(source) == round(0.9 * 900_000**2)
  assert re.fullmatch(r'\d{6}\+\d{6}=', source[len(source) - 1]['prompt'])


def test_rows_outside_the_source_raise():
  source = sources.arithmetic(digits=1)
  for row in (-1, len(source)):
    with pytest.raises(IndexError):
      source[row]


@pytest.mark.parametrize('knobs', [{'operator': '/'}, {'split': 'test'}, {'holdout': 2.0}])
def test_arithmetic_refuses_what_it_does_not_know(knobs):
  with pytest.raises(ValueError, match=str(next(iter(knobs.values())))):
    sources.arithmetic(**knobs)


def pairs_of(*, seed: int = 0, **knobs):
  return sources.wrong_digit_pairs(source=sources.arithmetic(**knobs), seed=seed)


@pytest.mark.parametrize('operator', ['+', '-', '*'])
@pytest.mark.parametrize('digits', [1, 2])
def test_pairs_reject_a_number_that_differs_in_one_digit(digits, operator):
  knobs = {'digits': digits, 'operator': operator}
  for problem, pair in zip(sources.arithmetic(**knobs), pairs_of(**knobs), strict=True):
    chosen, rejected = pair['chosen'], pair['rejected']
    margin = abs(int(chosen) - int(rejected))
    assert pair == {**problem, 'chosen': problem['answer'], 'rejected': rejected, 'margin': margin}
    assert len(chosen) == len(rejected) and sum(map(str.__ne__, chosen, rejected)) == 1
    assert rejected == str(int(rejected))  # neither 07 nor -0, and the sign is no digit


def test_pairs_change_every_place_to_every_digit():
  pairs = [p for p in pairs_of(digits=2) if len(p['answer']) == 2]
  changes = {
    (i, p['rejected'][i]) for p in pairs for i in (0, 1) if p['chosen'][i] != p['rejected'][i]
  }
  assert changes == {(0, d) for d in '123456789'} | {(1, d) for d in '0123456789'}
  assert {p['rejected'] for p in pairs_of(digits=1)} >= set('0123456789')


def test_pairs_depend_on_row_and_seed_alone():
  first, again, other = (pairs_of(digits=1, seed=s) for s in (0, 0, 1))
  assert first[7] == again[7] and list(first) == list(again)
  wrong = [{p['prompt']: p['rejected'] for p in source} for source in (first, other)]
  assert any(wrong[0][prompt] != wrong[1][prompt] for prompt in wrong[0].keys() & wrong[1].keys())


def test_pairs_of_words_are_refused(tmp_path):
  pairs = sources.wrong_digit_pairs(
    source=read(tmp_path / 'rows', '{"prompt": "a", "answer": "b"}')
  )
  with pytest.raises(ValueError, match="row 0: the answer 'b' is no whole number"):
    pairs[0]


@pytest.mark.parametrize('digits', [1, 2])
def test_choices_are_the_answer_and_numbers_that_differ_in_one_digit(digits):
  problems = sources.arithmetic(digits=digits)
  source = sources.with_choices(source=problems, letters='xyz')
  assert len(source) == len(problems)
  for problem, record in zip(problems, source, strict=True):
    question, *lines = record['prompt'].split('\n')
    numbers = dict(line.split() for line in lines)
    assert question == problem['prompt'] and list(numbers) == list('xyz')
    assert numbers.pop(record['answer']) == problem['answer'] and record['rejected'] in numbers
    assert record['margin'] == abs(int(numbers[record['rejected']]) - int(problem['answer']))
    assert len(set(numbers.values())) == 2
    for number in numbers.values():
      assert sum(map(str.__ne__, number, problem['answer'])) == 1
  assert {r['answer'] for r in source} == set('xyz')
  assert list(source) == list(sources.with_choices(source=problems, letters='xyz'))


@pytest.mark.parametrize('letters', ['A', 'AA', 'ABCDEFGHI'])
def test_choices_need_different_letters(letters):
  with pytest.raises(ValueError, match=f"letters '{letters}' must be two to eight different ones"):
    sources.with_choices(source=sources.arithmetic(), letters=letters)


@pytest.mark.parametrize('system', ['', 'Answer with a number.'])
def test_as_chat_turns_the_prompt_into_messages_and_keeps_the_rest(system):
  pairs = pairs_of(digits=1)
  chat = sources.as_chat(source=pairs, system=system)
  assert len(chat) == len(pairs)
  pair, record = pairs[3], chat[3]
  turns = [{'role': 'system', 'content': system}, {'role': 'user', 'content': pair.pop('prompt')}]
  assert record == {'messages': turns if system else turns[1:], **pair}


def test_as_chat_puts_the_system_turn_before_prompts_and_before_chats_without_one(tmp_path):
  source = read(
    tmp_path / 'rows',
    '{"prompt": "a"}',
    '{"messages": [{"role": "user", "content": "b"}]}',
    '{"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "c"}]}',
  )
  chat = sources.as_chat(source=source)
  assert chat[0] == {'messages': [{'role': 'user', 'content': 'a'}]}
  assert chat[1]['messages'] == source[1]['messages']
  chat = sources.as_chat(source=source, system='short')
  turns = [[turn['content'] for turn in record['messages']] for record in chat]
  assert turns == [['short', 'a'], ['short', 'b'], ['own', 'c']]


def test_as_chat_composes_in_a_configuration():
  spec = part(sources.as_chat, source=part(sources.arithmetic, digits=1), system='Add.')
  assert [m['content'] for m in bind(spec, sources.TABLE)[0]['messages']] == [
    'Add.',
    sources.arithmetic(digits=1)[0]['prompt'],
  ]
  with pytest.raises(ValueError, match=r"unknown 'sources\.as_chat'"):
    bind(part(sources.as_chat, source=spec), sources.TABLE)


def test_jsonl_reads_every_kind_of_record_and_skips_blank_lines(tmp_path):
  rows = [
    {'prompt': 'a\u2028b', 'answer': 'c', 'extra': [1, None]},
    {'messages': [{'role': 'user', 'content': 'hi'}], 'chosen': 'x', 'rejected': 'y'},
  ]
  lines = [json.dumps(rows[0], ensure_ascii=False), '  ', json.dumps(rows[1]), '']
  assert list(read(tmp_path / 'rows', *lines)) == rows


HELLO = {'role': 'assistant', 'content': 'hello'}
HI = {'role': 'user', 'content': 'hi'}


def user(content, role='user') -> str:
  return json.dumps({'messages': [{'role': role, 'content': content}]})


@pytest.mark.parametrize(
  ('record', 'expected'),
  [
    ({'question': '2+2', 'answer': 4}, {'prompt': '2+2', 'answer': '4'}),
    ({'prompt': 'a', 'completion': 'b'}, {'prompt': 'a', 'answer': 'b'}),
    ({'prompt': [HI], 'answer': 'b'}, {'messages': [HI], 'answer': 'b'}),
    ({'prompt': [HI], 'completion': [HELLO]}, {'messages': [HI, HELLO]}),
    (
      {'conversations': [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'hello'}]},
      {'messages': [HI, HELLO]},
    ),
    (
      {'prompt': [HI], 'chosen': [HELLO], 'rejected': [HELLO | {'content': 'x'}]},
      {'messages': [HI], 'chosen': 'hello', 'rejected': 'x'},
    ),
    (
      {'chosen': [HI, HELLO], 'rejected': [HI, HELLO | {'content': 'x'}]},
      {'messages': [HI], 'chosen': 'hello', 'rejected': 'x'},
    ),
    (
      {'prompt': 'hi', 'chosen': [HI, HELLO], 'rejected': [HI, HELLO | {'content': 'x'}]},
      {'prompt': 'hi', 'chosen': 'hello', 'rejected': 'x'},
    ),
    (
      {
        'messages': [
          HI | {'content': [{'type': 'text', 'text': 'h'}, {'type': 'text', 'text': 'i'}]}
        ]
      },
      {'messages': [HI]},
    ),
    (
      {'messages': [HI, {'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]}]},
      {'messages': [HI, {'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'f'}]}]},
    ),
    ({'prompt': 'hi', 'completion': [HELLO]}, {'messages': [HI, HELLO]}),
    ({'messages': [HI | {'value': 0.5}]}, {'messages': [HI | {'value': 0.5}]}),
    ({'prompt': 'a', 'conversations': 3}, {'prompt': 'a', 'conversations': 3}),
    ({'messages': [HI], 'tools': '[{"name": "f"}]'}, {'messages': [HI], 'tools': [{'name': 'f'}]}),
    ({'messages': [HI], 'tools': None}, {'messages': [HI], 'tools': None}),
    ({'prompt': 'a', 'id': 'task-77'}, {'prompt': 'a', 'record_id': 'task-77'}),
  ],
)
def test_usual_forms_of_records_are_read(tmp_path, record, expected):
  assert read(tmp_path / 'rows', json.dumps(record))[0] == expected


@pytest.mark.parametrize(
  'encode',
  [
    lambda text: b'\xef\xbb\xbf' + text.encode(),
    lambda text: text.encode('utf-16'),
    lambda text: gzip.compress(text.encode()),
    lambda text: text.replace('\n', '\r\n').encode(),
  ],
  ids=['byte-order mark', 'utf-16', 'gzip', 'carriage returns'],
)
def test_files_that_are_not_plain_utf8_are_read(tmp_path, encode):
  rows = [{'prompt': 'é', 'answer': '1'}, {'prompt': 'b', 'answer': '2'}]
  (tmp_path / 'rows').write_bytes(
    encode(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))
  )
  assert list(sources.jsonl(path=str(tmp_path / 'rows'))) == rows


@pytest.mark.parametrize(
  ('data', 'why'),
  [
    (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"rows:2: 'utf-8' codec"),
    (b'', 'rows: no records'),
    (b'\n \n', 'rows: no records'),
    (gzip.compress(mtime=0, data=b'{"prompt": "a"}')[:-9], 'rows: Compressed file ended'),
    (b'\xff\xfea', "rows: 'utf-16"),
  ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, data, why):
  (tmp_path / 'rows').write_bytes(data)
  with pytest.raises(ValueError, match=why):
    sources.jsonl(path=str(tmp_path / 'rows'))


@pytest.mark.parametrize(
  ('line', 'why'),
  [
    ('{"prompt": ', 'Expecting value'),
    ('[1]', 'expected an object, got list'),
    ('{"text": "a"}', r"either prompt or messages, got \['text'\]"),
    ('{"prompt": "a", "messages": []}', 'either prompt or messages'),
    ('{"prompt": "a", "answer": true}', 'answer must be text, got True'),
    ('{"prompt": "a", "answer": null}', 'answer must be text, got None'),
    ('{"prompt": "a\\ud800"}', 'surrogates not allowed'),
    ('[' * 100_000, 'recursion'),
    (user(None), r'messages\[0\]\.content: expected text, got None'),
    (user([{'type': 'image', 'url': 'x'}]), r'messages\[0\]\.content: expected text'),
    (user('hi', role='usr'), r"messages\[0\]\.role: unknown 'usr'; valid: \['system'"),
    (json.dumps(dict(chosen=[HELLO], rejected=[HELLO | {'content': 'x'}])), 'have no prompt'),
    ('{"messages": []}', 'messages must be a list'),
    ('{"prompt": "a", "tools": {"name": "f"}}', 'tools must be a list'),
    ('{"prompt": "a", "tools": "f(x)"}', 'tools must be a list'),
    (json.dumps(dict(prompt={'a': 1}, completion=[HELLO])), 'prompt must be text'),
    ('{"messages": ["a"]}', r'messages\[0\] needs role and content'),
    ('{"prompt": ["a"]}', r'prompt\[0\] needs role and content'),
    ('{"prompt": "a", "answer": [1]}', r'answer\[0\] needs role and content'),
    ('{"prompt": "a", "completion": [1]}', r'completion\[0\] needs role and content'),
  ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, why):
  with pytest.raises(ValueError, match=rf'rows:3: .*{why}'):
    read(tmp_path / 'rows', '{"prompt": "fine"}', '', line)


@pytest.fixture
def sums(tmp_path):
  """Five sums in array_record form."""
  features = {'question': tfds.features.Text(), 'answer': tfds.features.Text(), 'level': np.int32}
  identity = tfds.core.DatasetIdentity(
    name='sums', version=tfds.core.Version('1.0.0'), data_dir=str(tmp_path), module_name='sums'
  )
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  writer = tfds.core.SequentialWriter(info, 10, overwrite=False, file_format='array_record')
  writer.initialize_splits(['train'])
  writer.add_examples(
    {'train': [{'question': f'é{i}+{i}', 'answer': str(2 * i), 'level': i} for i in range(5)]}
  )
  writer.close_all()
  return str(tmp_path)


def test_tfds_is_read_as_text_without_tensorflow(sums):
  source = sources.tfds_records(path=sums, split='train', prompt_field='question')
  assert list(source) == [
    {'prompt': f'é{i}+{i}', 'answer': str(2 * i), 'level': i} for i in range(5)
  ]
  assert type(source[0]['level']) is int
  assert 'tensorflow' not in sys.modules


def test_tfds_slices_and_leaves_other_fields_alone(sums):
  source = sources.tfds_records(
    path=sums, split='train[:2]', prompt_field='question', answer_field=''
  )
  assert [r['answer'] for r in source] == ['0', '2']


def test_tfds_names_a_missing_field_with_the_valid_ones(sums):
  with pytest.raises(
    ValueError, match=r"no field \['prompt'\]; valid: \['answer', 'level', 'quest"
  ):
    sources.tfds_records(path=sums, split='train')


def test_reasoning_gym_problems_carry_what_their_scorer_needs():
  source = sources.reasoning_gym(task='basic_arithmetic', size=3, seed=7, options={'max_terms': 2})
  assert len(list(source)) == 3
  record = source[1]
  assert record['prompt'] == record['entry']['question']
  assert record['answer'] == record['entry']['answer']
  assert record['entry']['metadata']['source_dataset'] == 'basic_arithmetic'
  assert (
    record
    == sources.reasoning_gym(task='basic_arithmetic', size=9, seed=7, options={'max_terms': 2})[1]
  )


def test_reasoning_gym_seeds_overlap_as_documented():
  first, second = (sources.reasoning_gym(task='basic_arithmetic', size=3, seed=s) for s in (7, 8))
  assert first[1]['prompt'] == second[0]['prompt']


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
  genuine = builtins.__import__

  def missing(name, *args, **kwargs):
    if name == 'reasoning_gym':
      raise ImportError(name)
    return genuine(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', missing)
  with pytest.raises(ImportError, match=r'polgrad\[tasks\]'):
    sources.reasoning_gym(task='countdown', size=1, seed=0)


def test_fractions_of_one_source_share_no_row_and_miss_none():
  whole = sources.arithmetic(digits=1)
  held, train = (sources.fraction(source=whole, start=a, end=b) for a, b in [(0, 0.1), (0.1, 1)])
  assert (len(held), len(train)) == (9, 81)
  rows = [record['prompt'] for part in (held, train) for record in part]
  assert sorted(rows) == sorted(record['prompt'] for record in whole)
  assert [r['prompt'] for r in held] != [whole[i]['prompt'] for i in range(9)]  # shuffled
  with pytest.raises(ValueError, match=r'start 0\.5 and end 0\.5'):
    sources.fraction(source=whole, start=0.5, end=0.5)
  with pytest.raises(ValueError, match=r'no row of 90 lies between 0\.0 and 0\.001'):
    sources.fraction(source=whole, start=0.0, end=0.001)


@pytest.mark.parametrize(
  'make', [sources.jsonl, lambda path: sources.tfds_records(path=path, split='a')]
)
def test_a_missing_file_is_named_at_once(tmp_path, make):
  with pytest.raises(FileNotFoundError, match='nowhere: expected'):
    make(path=str(tmp_path / 'nowhere'))


def test_table_entries_bind(tmp_path, sums):
  for name in ('rows', 'rows.jsonl'):
    (tmp_path / name).write_text('{"prompt": "a", "margin": 1}')
  knobs = {
    'arithmetic': {'digits': 1},
    'wrong_digit_pairs': {'source': part(sources.arithmetic, digits=1)},
    'wrong_digit_lists': {'source': part(sources.arithmetic, digits=1)},
    'split_pairs': {'source': part(sources.arithmetic, digits=1)},
    'same_sums': {'source': part(sources.arithmetic, digits=1)},
    'worked_sums': {'source': part(sources.arithmetic, digits=1)},
    'with_choices': {'source': part(sources.arithmetic, digits=1)},
    'as_chat': {'source': part(sources.arithmetic, digits=1)},
    'fraction': {'source': part(sources.arithmetic, digits=1)},
    'without': {'source': part(sources.arithmetic, digits=1), 'pattern': 'a'},
    'calls_and_answers': {'source': part(sources.word_problems)},
    'tastes': {},
    'between': {'source': part(sources.jsonl, path=str(tmp_path / 'rows')), 'field': 'margin'},
    'mixture': {
      'sources': {'one': part(sources.tastes), 'two': part(sources.arithmetic, digits=1)}
    },
    'with_context': {'source': part(sources.tastes, size=20)},
    'with_demonstrations': {'source': part(sources.tastes, size=20)},
    'confident_pairs': {'source': part(sources.tastes)},
    'private_bags': {
      'source': part(sources.wrong_digit_lists, source=part(sources.arithmetic, digits=1))
    },
    'hidden_numbers': {},
    'nim_moves': {},
    'nim_positions': {},
    'seeds': {},
    'word_problems': {},
    'jsonl': {'path': str(tmp_path / 'rows')},
    'hub': {'path': str(tmp_path / 'rows.jsonl')},
    'tfds_records': {'path': sums, 'split': 'train', 'prompt_field': 'question'},
    'reasoning_gym': {
      'task': 'basic_arithmetic',
      'size': 2,
      'seed': 0,
      'options': {'max_terms': 2},
    },
  }
  # The package verifiers is not there.
  assert {f'sources.{name}' for name in knobs} == sources.TABLE.keys() - {'sources.verifiers'}
  for name, given in knobs.items():
    source = bind(part(sources.TABLE[f'sources.{name}'], **given), sources.TABLE)
    record = source[0]
    asked = record['prompt'] if 'prompt' in record else record['messages'][-1]['content']
    assert isinstance(asked, str)


@pytest.mark.parametrize(
  ('count', 'most', 'rows'),
  [(10, 4, [0, 2, 5, 7]), (3, 4, [0, 1, 2]), (3, 0, [0, 1, 2]), (0, 4, [])],
)
def test_spaced_rows_are_all_or_few_that_reach_to_the_end(count, most, rows):
  assert sources.spaced(count, most) == rows


def test_the_work_of_worked_sums_is_right_and_ends_with_the_sum():
  source = sources.worked_sums(source=sources.arithmetic(digits=2))
  kinds = {'none': 0, 'some': 0, 'all': 0}
  for record in (source[i] for i in range(300)):
    first, second = map(int, record['prompt'].rstrip('=').split('+'))
    work, _, answer = record['answer'].rpartition(' ')
    assert int(answer) == first + second
    units = first % 10 + second % 10
    tens = first // 10 + second // 10 + units // 10
    said = [int(column[-2:]) for column in re.findall(r'[^: ]+', work)]
    assert said == ([] if not work else [units, tens])
    for a, b, carry, column in re.findall(r'(\d)\+(\d)\+(\d)=(\d\d)', work):
      assert int(a) + int(b) + int(carry) == int(column)
    kinds['all' if '+' in work else 'some' if work else 'none'] += 1
  assert all(70 < number < 130 for number in kinds.values())


def test_a_source_is_split_by_a_number():
  pairs = sources.wrong_digit_pairs(source=sources.arithmetic(digits=1))
  low, high = (
    sources.between(source=pairs, field='margin', **b) for b in (dict(below=4), dict(at_least=4))
  )
  assert len(low) + len(high) == len(pairs) and len(low) > 0
  assert max(r['margin'] for r in low) < 4 <= min(r['margin'] for r in high)
  with pytest.raises(ValueError, match='row 0: marge must be a number, got None'):
    sources.between(source=pairs, field='marge')
  with pytest.raises(ValueError, match=r'no record of \d+ has margin in \[1000, inf\)'):
    sources.between(source=pairs, field='margin', at_least=1000)


def test_private_bags_have_the_truncated_mean_with_laplace_noise_that_is_drawn_once():
  lists = sources.Source(4000, lambda row: {'rewards': [-5.0, 0.25, 0.5, 9.0], 'prompt': str(row)})
  found = sources.private_bags(source=lists, epsilon=0.5, low=0.0, high=1.0, seed=3)
  assert found[7] == found[7] and found[7]['prompt'] == '7'
  rewards = np.array([found[row]['rewards'] for row in range(len(lists))])
  assert np.all(rewards == rewards[:, :1])
  noise = rewards[:, 0] - (0 + 0.25 + 0.5 + 1) / 4
  scale = 1 / (
    4 * 0.5
  )  # of the Laplace distribution: the mean of |x|, and its median is log 2 of it
  np.testing.assert_allclose(np.abs(noise).mean(), scale, rtol=0.05)
  np.testing.assert_allclose(np.median(np.abs(noise)), np.log(2) * scale, rtol=0.06)
  assert abs(noise.mean()) < 0.05
  with pytest.raises(ValueError, match='low=1 must be below high=0'):
    sources.private_bags(source=lists, low=1.0, high=0.0)
  pairs = sources.Source(1, lambda row: {'rewards': 'none'})
  with pytest.raises(ValueError, match=r"row 0: rewards must be a list .* got 'none'"):
    sources.private_bags(source=pairs)[0]


def test_demonstrations_beside_a_record_are_of_other_rows_or_of_another_source():
  plain, other = sources.arithmetic(digits=1), sources.arithmetic(digits=2)
  none = sources.nothing()
  beside = sources.with_demonstrations(source=plain, demonstrations=none, count=4)
  for row in (0, 7, len(plain) - 1):
    found = beside[row]
    others = [one['prompt'] for one in found.pop('demonstrations')]
    assert found == plain[row] and len({*others, found['prompt']}) == 5
    assert beside[row] == beside[row]
  three = dataclasses.replace(other, size=3)
  given = sources.with_demonstrations(source=plain, demonstrations=three, count=3)
  prompts = lambda row: [one['prompt'] for one in given[row]['demonstrations']]
  assert {*prompts(0)} == {other[i]['prompt'] for i in range(3)}
  assert len({tuple(prompts(row)) for row in range(20)}) > 1
  again = sources.with_demonstrations(source=plain, demonstrations=three, count=5)
  assert len(again[0]['demonstrations']) == 5
  with pytest.raises(ValueError, match='the only record of the source'):
    one = dataclasses.replace(plain, size=1)
    sources.with_demonstrations(source=one, demonstrations=none)
