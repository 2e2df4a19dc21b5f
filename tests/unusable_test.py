"""Records of completions that teach nothing: refused with file, row and field, or dropped."""

import json

import pytest

from polgrad import build, check, phases, tasks
from polgrad.checks import reading
from polgrad.collect import Feedback, Lists, Preferences
from polgrad.data import batching, tokenizers
from polgrad.options import from_text

BYTE = tokenizers.byte()._replace(bos_id=-1)
GOOD = {
  'pairs': {'prompt': '1+1=', 'chosen': '2', 'rejected': '3'},
  'margins': {'prompt': '1+1=', 'chosen': '2', 'rejected': '3', 'margin': 0.5},
  'feedback': {'prompt': '1+1=', 'completion': '2', 'label': True},
  'lists': {'prompt': '1+1=', 'completions': ['2', '3', '4'], 'rewards': [1, 0, 0.5]},
}
METHODS = {'pairs': 'dpo', 'margins': 'odpo', 'feedback': 'kto', 'lists': 'infonca'}
BAD = [
  ('pairs', {'rejected': '2'}, 'chosen and rejected have the same tokens'),
  ('pairs', {'chosen': ' '}, "'chosen' is empty"),
  ('pairs', {'rejected': None}, "no 'rejected', only"),
  ('margins', {'margin': 'big'}, "margin must be a finite number, got 'big'"),
  ('margins', {'margin': float('inf')}, 'margin must be a finite number, got inf'),
  ('margins', {'margin': 1e39}, 'margin must be a finite number, got 1e+39'),
  ('margins', {'margin': 10**400}, 'margin must be a finite number, got 1000'),
  ('margins', {'margin': -0.5}, 'margin must be at least 0, got -0.5'),
  ('margins', {'margin': ...}, "there is no 'margin' here"),
  ('feedback', {'label': 1.5}, 'label must be true, false or a probability, got 1.5'),
  ('feedback', {'label': 'good'}, "label must be true, false or a probability, got 'good'"),
  ('feedback', {'label': ...}, "no 'label', only"),
  ('feedback', {'completion': ...}, "no 'completion', only"),
  ('feedback', {'completion': ''}, "'completion' is empty"),
  ('lists', {'rewards': [1, 'x', 0]}, "rewards must be a number, got 'x'"),
  ('lists', {'rewards': [1, 0]}, '3 completions and 2 rewards'),
  ('lists', {'rewards': ...}, 'rewards must be a list, there is only'),
  ('lists', {'completions': ['2', '', '4']}, "'completions' is empty"),
  ('lists', {'completions': ['2', 3, '4']}, 'completions must be texts, got 3'),
  ('lists', {'completions': ['2'] * 3}, 'all completions have the same tokens'),
]


def write(folder, kind, change, rows=20):
  bad = {k: v for k, v in (GOOD[kind] | change).items() if v is not ...}
  path = folder / 'data.jsonl'
  path.write_text('\n'.join(map(json.dumps, [GOOD[kind]] * rows + [bad])))
  return path


def text(path, kind, **options):
  options = {'prompt_length': 8, 'max_new_tokens': 4, 'warm_start': 0, 'holdout': 0} | options
  settings = ','.join(f'{k}={v}' for k, v in options.items())
  return f'method={METHODS[kind]},task=jsonl,data={path},model=tiny,smoke,{settings}'


@pytest.mark.parametrize(('kind', 'change', 'words'), BAD)
def test_a_bad_record_is_refused_before_the_first_step_or_dropped_and_counted(
  tmp_path, kind, change, words
):
  path = write(tmp_path, kind, change)
  config = from_text(text(path, kind))
  with pytest.raises(ValueError) as error:
    build.check_data(build.build(config))
  assert f'config.phases.train.source: {path}:21: {words}' in str(error.value)
  assert 'set unusable to drop' in str(error.value)

  config.phases.train.collect.unusable = 'drop'
  run = build.build(config)
  [told] = build.check_data(run)
  assert told.endswith('of 21 records that were looked at, 1 are unusable and dropped')
  draw = phases.Drawer(run.phases['train'], seed=0, cursor=0, tokenizer=run.tokenizer)
  assert 20 not in {record['id'] for record in draw(20)}
  assert draw.report() == {'records/dropped': draw.cursor - 20, 'records/cut': 0}


def test_the_check_lists_bad_records_or_says_how_many_are_dropped(tmp_path):
  path = write(tmp_path, 'pairs', {'rejected': '2'})
  config = from_text(text(path, 'pairs'))
  said = {}
  for unusable in ('error', 'drop'):
    config.phases.train.collect.unusable = unusable
    run = build.build(config)
    [section] = build.data_sections(run)
    job = reading.ReadJob(section.source, section.reader, run.tokenizer)
    said[unusable] = check.check_records(section, job.read(range(21)))
  [wrong] = [one for one in said['error'].findings if one.fails]
  assert f'{path}:21: chosen and rejected have the same tokens' in wrong.text
  assert '--config.phases.train.collect.unusable=drop' in wrong.mend
  assert not any(one.fails for one in said['drop'].findings)
  [told] = [one for one in said['drop'].findings if 'unusable' in one.text]
  assert '1 of 21 records are unusable and dropped' in told.text and f'{path}:21' in told.text


def test_a_pair_that_is_made_equal_by_its_cut_is_unusable():
  record = {'prompt': 'a', 'chosen': 'bbbc', 'rejected': 'bbbd', 'id': 3}
  words = 'record 3: cut to 4 tokens, chosen and rejected are the same'
  with pytest.raises(batching.Unusable, match=words):
    batching.pairs([record], BYTE, length=4, cut=True)
  reader = Preferences(length=4, overlong='truncate', unusable='drop')
  assert batching.fate(reader, record, BYTE) == 'unusable'
  assert batching.fate(reader, record | {'chosen': 'x'}, BYTE) == 'cut'


@pytest.mark.parametrize(
  ('label', 'number'), [(True, 1), (False, 0), (0, 0), (1, 1), (0.25, 0.25), ('True', 1), ('0.5', 0.5)]
)  # fmt: skip
def test_labels_are_true_false_or_a_probability_also_as_text(label, number):
  record = {'prompt': 'a', 'answer': 'b', 'label': label, 'id': 0}
  assert batching.feedback([record], BYTE, length=8).label.tolist() == [number]


def test_a_labelled_conversation_is_judged_by_its_last_turn(tmp_path):
  turns = [('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd')]
  messages = [{'role': role, 'content': content} for role, content in turns]
  record = {'messages': messages, 'label': 1, 'id': 0}
  got = batching.feedback([record], BYTE, length=64)
  text = BYTE.decode([int(i) for i in got.tokens[0][got.mask[0]]])
  assert text == 'd' and got.mask.sum() == 2  # with its stop token
  [row] = batching.read(record, BYTE, Feedback().fields)
  assert sum(row.trained) == 2
  path = tmp_path / 'data.jsonl'
  path.write_text(json.dumps({'messages': messages, 'label': True}))
  assert tasks.jsonl(data=str(path), holdout=0).has == ('demonstrations', 'feedback')


def test_a_prompt_is_mismatched_with_the_next_completion_of_another_prompt():
  rows = [('a', '1'), ('a', '22'), ('b', '333'), ('cccc', '4')]
  records = [{'prompt': p, 'answer': c, 'label': 1, 'id': i} for i, (p, c) in enumerate(rows)]
  got = batching.feedback(records, BYTE, length=6, mismatched=True)
  read = lambda tokens, mask: BYTE.decode([int(i) for i in tokens[mask]])
  other = got.features
  said = [
    (
      read(other['mismatched_tokens'][i], other['mismatched_segment_ids'][i] > 0),
      read(other['mismatched_tokens'][i], other['mismatched_mask'][i]),
    )
    for i in range(4)
  ]
  assert said == [('a333', '333'), ('a333', '333'), ('b4', '4'), ('cccc1', '1')]
  assert got.mask.sum(axis=1).tolist() == [2, 3, 4, 2]  # the rows themselves are as without
  alone = batching.feedback(records[:2], BYTE, length=6, mismatched=True).features
  assert not alone['mismatched_mask'].any() and not alone['mismatched_segment_ids'].any()


def test_a_list_with_fewer_completions_has_empty_rows():
  record = {'prompt': 'a', 'completions': ['1', '22'], 'rewards': [0, 2.5], 'id': 0}
  got = batching.lists([record, record], BYTE, length=6, size=3)
  assert got.valid.tolist() == [True, True, False] * 2
  assert got.rewards.tolist() == [0, 2.5, 0] * 2
  assert got.group_ids.tolist() == [0] * 3 + [1] * 3
  assert got.mask.sum(axis=1).tolist() == [2, 3, 0] * 2
  with pytest.raises(batching.Unusable, match='2 completions, but the lists have room for 1'):
    batching._listed(record, 1)
  [first, second] = batching.read(record, BYTE, Lists().fields)
  assert (len(first.ids), len(second.ids)) == (3, 4)


def test_a_run_whose_records_are_all_dropped_says_why_the_first_one_is(tmp_path):
  path = tmp_path / 'data.jsonl'
  path.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "2"}\n' * 3)
  config = from_text(text(path, 'pairs'))
  config.phases.train.collect.unusable = 'drop'
  with pytest.raises(ValueError, match='each of 3 records') as error:
    build.check_data(build.build(config))
  assert str(error.value).endswith(f'example {path}:1: chosen and rejected have the same tokens')
