"""Records that are longer than there is room for: refused, dropped or cut, in every role of data."""

import argparse
import json

import numpy as np
import pytest

from polgrad import build, curricula, evaluate, phases
from polgrad.collect import scored
from polgrad.collect.drawn import Drawn
from polgrad.data import batching, tokenizers
from polgrad.options import from_text
from polgrad.types import Batch
from tests import examples

BYTE = tokenizers.byte()._replace(bos_id=-1)
LONG = 12  # tokens of the one prompt that is too long, where 8 have room
FILES = {
  'grpo': {'prompt': '1+1=', 'answer': '2'},
  'luffy': {'prompt': '1+1=', 'answer': '2'},
  'sft': {'prompt': '1+1=', 'answer': '2'},
  'dpo': {'prompt': '1+1=', 'answer': '2', 'chosen': '2', 'rejected': '3'},
}


def experiment(folder, method, overlong='', rows=20, **long):
  """A run on short records and, as the last row, a long one."""
  record = FILES[method]
  path = folder / 'data.jsonl'
  long = long or {'prompt': '1' * LONG}
  path.write_text('\n'.join(map(json.dumps, [record] * rows + [record | long])))
  options = f'task=jsonl,data={path},held_out={path},reward=exact_match,prompt_length=8'
  options += ',max_new_tokens=3,warm_start=0,model=tiny,smoke'
  options += f',overlong={overlong}' if overlong else ''
  return build.build(from_text(f'method={method},{options}'))


@pytest.mark.parametrize('method', FILES)
def test_one_record_that_is_too_long_is_refused_before_the_first_step(tmp_path, method):
  run = experiment(tmp_path, method)
  words = r'config\.phases\.train\.source: \S+:21: 1.* tokens.*set overlong to drop or truncate'
  with pytest.raises(ValueError, match=words):
    build.check_data(run)


@pytest.mark.parametrize('method', FILES)
def test_dropped_records_are_counted_and_the_next_ones_are_drawn(tmp_path, method):
  run = experiment(tmp_path, method, 'drop')
  assert build.check_data(run)[0].startswith(
    'config.phases.train.source: of 21 records that were looked at, 1 are'
  )
  draw = phases.Drawer(run.phases['train'], seed=0, cursor=0, tokenizer=run.tokenizer)
  records = draw(40)
  assert len(records) == 40 and 20 not in {r['id'] for r in records}
  dropped = draw.cursor - 40
  assert dropped in (1, 2)
  assert draw.report() == {'records/dropped': dropped, 'records/cut': 0}
  # A run that resumes anywhere draws the same.
  first = phases.Drawer(run.phases['train'], seed=0, cursor=0, tokenizer=run.tokenizer)
  begun = first(13)
  after = phases.Drawer(run.phases['train'], seed=0, cursor=first.cursor, tokenizer=run.tokenizer)
  assert begun + after(27) == records and after.cursor == draw.cursor


def test_a_curriculum_proposes_other_records_for_those_that_are_dropped(tmp_path):
  run = experiment(tmp_path, 'grpo', 'drop')
  phase = examples.changed(run.phases['train'], curriculum=curricula.uniform())
  draw = phases.Drawer(phase, seed=0, cursor=0, tokenizer=run.tokenizer)
  found = [record['id'] for record in draw(20)]
  assert sorted(found) == list(range(20)) and draw.cursor in (20, 21)
  assert {*draw.taken} - {20} == {*found}


@pytest.mark.parametrize('rows', [[0, 1], [0, 1, -1], [0, 1, 21], [0.0, 1.0, 2.0]])
def test_proposals_that_are_no_rows_of_the_data_are_refused(tmp_path, rows):
  run = experiment(tmp_path, 'grpo', 'drop')
  one = curricula.uniform()._replace(propose=lambda state, request: np.array(rows))
  phase = examples.changed(run.phases['train'], curriculum=one)
  with pytest.raises(ValueError, match='asks for 3 row numbers from 0 to 20'):
    phases.Drawer(phase, seed=0, cursor=0, tokenizer=run.tokenizer)(3)


@pytest.mark.parametrize('method', FILES)
def test_cut_records_are_counted_and_drawn(tmp_path, method):
  run = experiment(tmp_path, method, 'truncate')
  if method in ('sft', 'dpo'):  # of a long prompt nothing would be left to train on
    long = dict.fromkeys(FILES[method], '1' * 8) | {'rejected': '3' * 8}
    run = experiment(tmp_path, method, 'truncate', **long)
  assert build.check_data(run)[0].endswith('0 are too long and dropped, 1 are cut')
  draw = phases.Drawer(run.phases['train'], seed=0, cursor=0, tokenizer=run.tokenizer)
  assert 20 in {r['id'] for r in draw(21)} and draw.cursor == 21
  assert draw.report() == {'records/dropped': 0, 'records/cut': 1}


def test_a_row_of_which_nothing_is_left_to_train_on_is_dropped_where_others_are_cut(tmp_path):
  run = experiment(tmp_path, 'sft', 'truncate')
  assert build.check_data(run)[0].endswith('1 are too long and dropped, 0 are cut')


@pytest.mark.parametrize('rows', [1, 20])
def test_a_source_of_which_all_is_dropped_is_refused(tmp_path, rows):
  path = tmp_path / 'data.jsonl'
  path.write_text('\n'.join([json.dumps({'prompt': '1' * LONG, 'answer': '1'})] * rows))
  text = f'method=grpo,task=jsonl,data={path},holdout=0,reward=exact_match,prompt_length=8'
  run = build.build(from_text(f'{text},model=tiny,smoke,warm_start=0,overlong=drop'))
  with pytest.raises(ValueError, match=f'each of {rows} records is too long'):
    build.check_data(run)
  draw = phases.Drawer(run.phases['train'], seed=0, cursor=0, tokenizer=run.tokenizer)
  with pytest.raises(ValueError, match=f'the last {2 * rows} records that were drawn are too long'):
    draw(1)


@pytest.mark.parametrize(('overlong', 'number'), [('drop', 5), ('truncate', 6)])
def test_held_out_problems_are_dropped_or_cut_and_counted(tmp_path, monkeypatch, overlong, number):
  asked = set()

  def make_sample(run, samples, policy):
    def sample(params, prompts, records, ids, **_):
      asked.update(ids.tolist())
      tokens = np.repeat(prompts.tokens, samples, axis=0)
      silent = np.zeros(tokens.shape, bool)
      batch = Batch(tokens=tokens, segment_ids=silent, mask=silent, finished=silent[:, 0])
      return Drawn(batch)

    return sample

  run = experiment(tmp_path, 'grpo', overlong, rows=5)
  fates = [fate for _, fate in evaluate.problems(run)]
  assert fates == ['kept'] * 5 + ['dropped' if overlong == 'drop' else 'cut']
  monkeypatch.setattr(evaluate, 'sampler', make_sample)
  found, shown = evaluate.make_evaluator(run)(None)
  assert asked == set(range(number)) and len(shown) == number
  counts = {'dropped': int(overlong == 'drop'), 'cut': int(overlong == 'truncate')}
  assert {k: found[f'evaluation/{k}'] for k in counts} == counts


def test_an_unknown_way_is_refused_with_the_known_ones(tmp_path):
  with pytest.raises(
    ValueError, match=r"collect\.overlong: unknown 'cut'; valid: \['drop', 'error'"
  ):
    experiment(tmp_path, 'grpo', 'cut')


def read(batch):
  return [BYTE.decode([int(i) for i in row]) for row in batch.tokens]


def test_a_prompt_loses_its_beginning_but_not_bos():
  record = {'prompt': 'abcdef', 'id': 0}
  got = batching.prompts([record, record | {'prompt': 'xy'}], BYTE, length=4, cut=True)
  assert read(got) == ['cdef', 'xy'] and got.mask.sum(axis=1).tolist() == [4, 2]
  with_bos = tokenizers.byte()
  got = batching.prompts([record], with_bos, length=4, cut=True)
  assert got.tokens[0].tolist() == [with_bos.bos_id, *b'def']


def test_a_row_loses_its_end_and_then_has_no_stop_token():
  record = {'prompt': 'ab', 'answer': 'cdef', 'id': 0}
  got = batching.supervised([record], BYTE, length=5, cut=True)
  assert read(got) == ['abcde'] and got.mask[0].tolist() == [False] * 2 + [True] * 3
  whole = batching.supervised([record], BYTE, length=7, cut=True)
  assert whole.tokens[0].tolist() == [*b'abcdef', BYTE.stop_ids[0]]
  with pytest.raises(batching.TooLong, match='record 0: nothing to train on is left in 2 tokens'):
    batching.supervised([record], BYTE, length=2, cut=True)


def test_a_conversation_loses_its_end():
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'bcd'}]
  text = 'user: a\nassistant: b'
  got = batching.supervised([{'messages': messages, 'id': 0}], BYTE, length=len(text), cut=True)
  assert read(got) == [text] and got.mask[0].tolist() == [False] * (len(text) - 1) + [True]


def test_pairs_lose_the_beginning_of_their_prompt_and_the_end_of_their_completions():
  record = {'prompt': 'abcd', 'chosen': 'efgh', 'rejected': 'x', 'id': 0}
  got = batching.pairs([record], BYTE, length=5, prompt_length=2, cut=True)
  assert read(got) == ['cdefg', 'cdx']
  assert got.mask.tolist() == [[False] * 2 + [True] * 3, [False] * 2 + [True] * 2 + [False]]
  got = batching.pairs([record], BYTE, length=6, cut=True)
  assert read(got) == ['abcdef', 'abcdx']


def test_a_demonstration_that_is_cut_is_not_finished():
  record = {'prompt': 'abcd', 'answer': 'efgh', 'id': 0}
  sizes = dict(prompt_length=3, max_new_tokens=3)
  got = scored.demonstrated([record, record | {'answer': 'e'}], BYTE, **sizes, cut=True)
  assert read(got) == ['bcdefg', 'bcde'] and got.finished.tolist() == [False, True]
  with pytest.raises(batching.TooLong, match='record 0: 4 tokens, longer than the limit of 3'):
    scored.demonstrated([record], BYTE, **sizes)


def test_one_that_is_found_only_when_it_is_drawn_is_named_with_the_option(tmp_path, monkeypatch):
  run = experiment(tmp_path, 'grpo')
  refuse = lambda *_: batching.prompts([{'prompt': '1' * LONG, 'id': 7}], BYTE, length=8)
  started = phases.PhaseRun(
    run, 'train', run.phases['train'], 0, refuse, None, {}, {}, {}, None, None, phases.Logs()
  )
  monkeypatch.setattr(phases, 'start_phase', lambda *_: started)
  state = argparse.Namespace(phase_step=1, cursor=0, curriculum_state=())
  words = r'config\.phases\.train\.source, step 1: record 7: 12 tokens.*collect\.overlong=drop'
  with pytest.raises(ValueError, match=words):
    phases.run_phase(run, state, None, phases.Logs())


@pytest.mark.parametrize('overlong', ['drop', 'truncate'])
@pytest.mark.parametrize('method', ['sft', 'dpo'])
def test_held_out_records_of_which_nothing_is_left_to_train_on_are_not_measured(
  tmp_path, method, overlong
):
  run = experiment(tmp_path, method, overlong, rows=3, prompt='1' * 99)
  phase = run.phases['train']
  context = phases.context(run, phase, 0)
  [source] = phase.held_out.values()
  [records] = evaluate.by_kind(phase, source, context).values()
  batches = list(evaluate.row_batches(phase.collect, records, context))
  assert sum(batch.mask.any(axis=1).sum() for batch in batches) == 3 * phase.rows_per_prompt
