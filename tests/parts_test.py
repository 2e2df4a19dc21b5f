"""Scores of parts of completions: from characters to tokens, and what is wrong with them."""

import doctest
import itertools
import pathlib
import re
import shlex
import types

import numpy as np
import pytest

from polgrad import build, cli, reward_models
from polgrad.collect import beginnings, parts
from polgrad.data import tokenizers
from polgrad.options import from_text
from polgrad.overrides import apply
from polgrad.registry import part
from polgrad.rewards import scoring, spans
from polgrad.rewards.worker import Failure
from polgrad.types import Batch
from tests.data import folders
from tests.runs import addition, method_of

TEXT = 'Hello hello wörld 🌍!\n\nnaïve café, the answer is 42!'


@pytest.mark.parametrize('module', [spans, parts])
def test_examples_print_what_they_say(module):
  assert doctest.testmod(module).failed == 0


def shown(tokens, tokenizer):
  """What each token shows of the decoded text."""
  text = tokenizer.decode(tokens)
  return text, [text[a:b] for a, b in parts.characters(tokens, tokenizer)]


@pytest.mark.parametrize('kind', ['byte', 'chatml', 'llama2', 'sentencepiece'])
def test_every_character_is_shown_by_the_tokens_that_have_its_bytes(kind, tmp_path):
  if kind == 'byte':
    tokenizer = tokenizers.byte()
  else:
    getattr(folders, kind if kind != 'sentencepiece' else 'llama2')(tmp_path)
    tokenizer = tokenizers.huggingface(path=str(tmp_path))
    if kind == 'sentencepiece':  # as if the bytes of its tokens were not known
      tokenizer = tokenizer._replace(pieces=None)
  tokens = [*tokenizer.encode(TEXT), tokenizer.stop_ids[0]]
  text, pieces = shown(tokens, tokenizer)
  if kind == 'byte':
    assert (text, pieces[-1]) == (TEXT, '')
    assert [p for p in pieces if p in 'ö🌍ïé'] == [*'öö', *'🌍🌍🌍🌍', *'ïï', *'éé', '']
  places = parts.characters(tokens, tokenizer)
  assert places[0][0] == 0 and max(b for _, b in places) == len(text) and pieces[-1] == ''
  # In order, and without a gap.
  for (a, b), (c, d) in itertools.pairwise(places):
    assert a <= c <= b <= max(b, d)
  moved = parts.characters(tokens, tokenizer, before=7)
  assert moved == [(a + 7, b + 7) for a, b in places]


def test_a_token_belongs_to_the_first_part_that_it_shows():
  where = [(0, 2), (2, 4), (4, 5), (5, 5), (5, 7), (7, 8)]
  ids, scores = parts.at_tokens([(1, 3, 0.5), (3, 4, -1.0), (4, 6, 0.25)], where)
  np.testing.assert_array_equal(ids, [0, 0, 1, -1, 1, -1])
  np.testing.assert_array_equal(scores, [0.5, 0.5, 0.25, 0, 0.25, 0])
  ids, scores = parts.at_tokens([], where)
  assert (ids == -1).all() and not scores.any()


def wrong(completion):
  return {
    'overlap': lambda: [(0, 4, 1.0), (3, 5, 1.0)],
    'empty': lambda: [(2, 2, 1.0)],
    'outside': lambda: [(0, 100, 1.0)],
    'nan': lambda: [(0, 1, float('nan'))],
    'number': lambda: 1.0,
    'raises': lambda: [1 / 0],
    'fine': lambda: [(2, 4, 1.0), (0, 2, -1.0)],
  }[completion]()


def test_parts_that_are_none_fail_and_are_named():
  mark = scoring.make_marker(wrong, isolate=False)
  texts = ['overlap', 'empty', 'outside', 'nan', 'number', 'raises', 'fine']
  found = mark(texts, [{}] * 7, [1] * 7, [0.0] * 7)
  assert found.parts == [None] * 6 + [[(0, 2, -1.0), (2, 4, 1.0)]]
  kinds = {'Overlap': 2, 'Outside': 1, 'NotFinite': 1, 'TypeError': 1, 'ZeroDivisionError': 1}
  assert found.errors == {f'spans/{kind}': n for kind, n in kinds.items()}
  assert 'row 0: spans: Overlap: [3, 5) is empty or begins before 4' in found.messages[0]
  with pytest.raises(ValueError, match=r"spans: it cannot read \['text'\]; valid: \['completion'"):
    scoring.make_marker(lambda text: [])


def test_a_function_of_whole_batches_gets_lists():
  def judge(completions, rewards, tokens):
    return [[(0, len(c), r + len(t))] for c, r, t in zip(completions, rewards, tokens)]

  judge.batched = True
  mark = scoring.make_marker(judge)
  found = mark(['ab', 'c'], [{}] * 2, [1, 2], [0.5, 0.0], {'tokens': lambda: [[1], [2, 3]]})
  assert found.parts == [[(0, 2, 1.5)], [(0, 1, 2.0)]]


def of_letters(completion, record, reward):
  """Each letter is a part with the reward as its score; a text with the record's letter fails."""
  return [(i, i + 1, reward / (c != record['bad'])) for i, c in enumerate(completion) if c != ' ']


def rows_of(texts, tokenizer, width=8):
  """A batch with these completions behind two tokens of a prompt; the last one is not finished."""
  tokens, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), bool)
  for row, text in enumerate(texts):
    ids = tokenizer.encode(text) + [tokenizer.stop_ids[0]] * (row < len(texts) - 1)
    tokens[row, 2 : 2 + len(ids)], mask[row, 2 : 2 + len(ids)] = ids, True
  return Batch(
    tokens=tokens,
    segment_ids=np.ones_like(tokens),
    mask=mask,
    finished=np.arange(len(texts)) < len(texts) - 1,
    rewards=np.arange(1.0, len(texts) + 1, dtype=np.float32),
    valid=np.arange(len(texts)) != 2,
  )


@pytest.mark.parametrize('opening', ['', '<think>'])
def test_a_batch_has_the_parts_of_its_rows_and_failed_rows_are_not_trained_on(opening):
  tokenizer = tokenizers.byte()._replace(opening=opening)
  batch = rows_of(['ab c', 'abx', 'ab', 'abcdef'], tokenizer)
  records = [{'prompt': '?', 'bad': 'x'}, {'prompt': '?', 'bad': 'y'}]
  if opening:  # verifiers see what the template writes of the turn
    records = [{'messages': [], 'bad': one['bad']} for one in records]
  context = types.SimpleNamespace(
    tokenizer=tokenizer, opened=list, mark=scoring.make_marker(of_letters, isolate=False)
  )
  found, errors, messages = parts.mark_rows(batch, records, context)
  np.testing.assert_array_equal(found.valid, [True, False, False, True])
  assert errors == {'spans/ZeroDivisionError': 1} and 'row 1: spans' in messages[0]
  ids = [[-1, -1, 0, 1, -1, 2, -1, -1], [-1] * 8, [-1] * 8, [-1, -1, 0, 1, 2, 3, 4, 5]]
  np.testing.assert_array_equal(found['span_ids'], ids)
  np.testing.assert_array_equal(
    found['span_scores'], np.where(np.array(ids) >= 0, batch.rewards[:, None], 0)
  )
  assert parts.metrics(found) == {'spans': 4.5, 'span_score': pytest.approx((3 * 1 + 6 * 4) / 9)}


def test_a_reward_model_scores_the_text_up_to_the_end_of_each_step(monkeypatch):
  read = []

  def scores(scorer, records, texts):
    read.extend(zip(records, texts))
    return [Failure('TooLong', 'of the model') if 'x' in text else len(text) for text in texts]

  monkeypatch.setattr(reward_models, 'scores', scores)
  monkeypatch.setattr(reward_models, 'load', lambda folder, **settings: folder)
  monkeypatch.setattr(reward_models, '_checked', lambda path: path)
  judge = reward_models.step_model(path='prm', most=2, scale=2.0)
  found = judge(['a\n\nbc', 'a\nx\ny', '', 'a\nb\nc\nd'], [{'n': i} for i in range(4)])
  part_of = lambda start, end: (start, end, pytest.approx(np.tanh(end / 4)))
  assert found[0] == [part_of(0, 3), part_of(3, 5)]
  assert found[1] == Failure('TooLong', 'of the model') and found[2] == []
  assert found[3] == [part_of(0, 2), part_of(2, 7)]
  assert read[0] == ({'n': 0}, 'a\n\n') and read[-1] == ({'n': 3}, 'a\nb\nc\nd')


def test_spans_without_a_reader_and_with_several_turns_are_refused():
  config = addition(method_of('grpo'))
  config.phases.train.spans = part(spans.agreeing_characters)
  with pytest.raises(ValueError, match=r'train.spans: nothing reads it; .*collect.spans=True'):
    build.build(config)
  config = addition(method_of('pure'))
  config.phases.train.collect.beginning = part(beginnings.uniform)
  with pytest.raises(
    ValueError, match=r'spans are parts of a completion .* leave out the beginning'
  ):
    build.build(config)


def test_a_function_that_fails_on_the_answers_in_the_data_is_refused_before_the_run():
  run = build.build(addition(method_of('pure'), isolate_verifiers=False))
  [section] = [one for one in build.data_sections(run) if not one.held_out]
  build._try_spans(section, run.tokenizer)
  object.__setattr__(section.judged, 'spans', lambda completion: [(0, 1, 1 / 0)])
  vars(section.judged).pop('mark', None)
  said = r'train.spans: it fails on all of \d+ records \(ZeroDivisionError: division by zero\)'
  with pytest.raises(ValueError, match=said):
    build._try_spans(section, run.tokenizer)


PAGE = (pathlib.Path(__file__).parent.parent / 'docs/process_rewards.md').read_text()


def test_the_page_shows_a_function_and_a_command_that_work(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = re.search(r'```python\n(.*?)```', PAGE, re.DOTALL)[1]
  (tmp_path / 'steps.py').write_text(code)
  [command] = re.findall(r'^python -m polgrad.train (.*)$', PAGE.replace('\\\n', ''), re.MULTILINE)
  [config, *_], changes = cli.split_changes(shlex.split(command))
  made = apply(from_text(config.partition('run.py:')[2]), changes, build.TABLE)
  phase = build.build(made).phases['train']
  assert phase.spans('ab\n\n' + 'c' * 81, {}) == [(0, 2, 1.0), (4, 85, -1.0)]
  for target in re.findall(r'\]\(([^):]+)\)', PAGE):
    assert (pathlib.Path(__file__).parent.parent / 'docs' / target).exists(), target
