"""Batches: who is masked, what ends a completion, and that nothing is cut."""

import doctest

import numpy as np
import pytest

from polgrad.data import batching, tokenizers

T = tokenizers.characters(alphabet='0123456789+=abc')
BYTE = tokenizers.byte()
PAD, EOS = T.pad_id, T.stop_ids[0]
SUMS = [
  {'prompt': '1+1=', 'answer': '2', 'id': 7},
  {'prompt': '99+1=', 'answer': '100', 'id': 3},
  {'prompt': 'a', 'answer': '', 'id': 0},
]


def test_prompts_are_padded_on_the_left_and_keep_rows_and_records():
  got = batching.prompts(SUMS, T, length=6)
  assert got.tokens.tolist() == [
    [PAD, PAD, *T.encode('1+1=')],
    [PAD, *T.encode('99+1=')],
    [PAD] * 5 + T.encode('a'),
  ]
  np.testing.assert_array_equal(got.mask, got.tokens != PAD)
  assert got.ids.tolist() == [7, 3, 0]
  assert got.records == tuple(SUMS)
  assert (got.tokens.dtype, got.mask.dtype, got.ids.dtype) == (np.int32, bool, np.int32)


def test_supervised_masks_answer_and_stop_token_only():
  got = batching.supervised(SUMS, T, length=10)
  assert got.tokens[0].tolist() == [*T.encode('1+1=2'), EOS, PAD, PAD, PAD, PAD]
  assert got.mask[0].tolist() == [False] * 4 + [True] * 2 + [False] * 4
  assert got.segment_ids[0].tolist() == [1] * 6 + [0] * 4
  assert got.mask.sum(axis=1).tolist() == [2, 4, 1]
  assert (got.tokens.dtype, got.mask.dtype, got.segment_ids.dtype) == (np.int32, bool, np.int32)
  assert got.weights is None and got.label is None


def test_the_completion_ends_with_the_stop_token_exactly_once():
  t = T._replace(encode=lambda text: [EOS if c == 'c' else i for c, i in zip(text, T.encode(text))])
  rows = [{'prompt': 'a', 'answer': answer, 'id': 0} for answer in ('12', '12c')]
  got = batching.supervised(rows, t, length=8)
  np.testing.assert_array_equal(got.tokens[0], got.tokens[1])
  np.testing.assert_array_equal(got.mask[0], got.mask[1])
  assert got.tokens[0, got.mask[0]].tolist() == [*T.encode('12'), EOS]
  with pytest.raises(ValueError, match=r"record 0: a stop token inside 'answer'"):
    batching.supervised([{'prompt': 'a', 'answer': '1c2', 'id': 0}], t, length=8)


@pytest.mark.parametrize(
  'asked', [{'prompt': '1+1+1='}, {'messages': [{'role': 'user', 'content': '1'}]}]
)
def test_a_step_is_trained_after_the_steps_before_it(asked):
  """What Step-DPO trains: each row is prompt, previous steps, step and stop token."""
  record = {**asked, 'previous_steps': '1+1=2 ', 'chosen': '2+1=3', 'rejected': '2+1=4', 'id': 0}
  got = batching.pairs([record], BYTE, length=60)
  prompt = batching.prompt_text(record, BYTE)
  for row, step in enumerate(('2+1=3', '2+1=4')):
    trained = got.tokens[row, got.mask[row]].tolist()
    seen = got.tokens[row, (got.segment_ids[row] > 0) & ~got.mask[row]].tolist()
    assert trained == [*BYTE.encode(step), BYTE.stop_ids[0]]
    assert [t for t in seen if t != BYTE.bos_id] == BYTE.encode(prompt + '1+1=2 ')
  with pytest.raises(ValueError, match=r'record 0: previous_steps must be text, got 2'):
    batching.pairs([record | {'previous_steps': 2}], BYTE, length=60)


@pytest.mark.parametrize(
  ('record', 'prompt', 'said'),
  [
    ({'prompt': 'q: ', 'answer': '4'}, 'q: <a>\n', '4'),
    ({'prompt': 'q: ', 'answer': '<a>\n4'}, 'q: <a>\n', '4'),
    ({'messages': [{'role': 'user', 'content': 'q'}], 'answer': '4'}, 'user: q\nassistant: (<a>\n', '4'),
    ({'messages': [{'role': 'user', 'content': 'q'}], 'answer': '(<a>\n4'},
     'user: q\nassistant: (<a>\n', '4'),
    ({'messages': [{'role': 'user', 'content': 'q'}], 'answer': '<a>\n4'},
     'user: q\nassistant: (<a>\n', '4'),
  ],
)  # fmt: skip
def test_a_prefix_ends_the_prompt_and_is_left_out_of_completions(record, prompt, said):
  def opened(messages, add_generation_prompt=True, tools=None):
    text = BYTE.chat(messages, add_generation_prompt, tools)
    return text + '(' if add_generation_prompt else text

  tokenizer = BYTE._replace(chat=opened, opening='(').sampling('<a>\n', ())
  got = batching.prompts([{**record, 'id': 0}], tokenizer, length=40)
  assert tokenizer.decode(got.tokens[0]) == prompt
  row = batching.supervised([{**record, 'id': 0}], tokenizer, length=40)
  assert tokenizer.decode(row.tokens[0]) == prompt + said
  assert tokenizer.decode(row.tokens[0, row.mask[0]]) == said
  assert batching.completion({**record, 'id': 0}, tokenizer) == [*said.encode(), *BYTE.stop_ids]


def test_pad_equal_to_stop_changes_no_mask():
  same = T._replace(pad_id=EOS)
  for make in (batching.supervised, batching.prompts):
    ours, theirs = make(SUMS, T, length=10), make(SUMS, same, length=10)
    np.testing.assert_array_equal(ours.mask, theirs.mask)
  got = batching.supervised(SUMS, same, length=10)
  assert (got.tokens[0, 5:] == EOS).all() and got.mask[0].sum() == 2


def test_prompt_ids_are_those_of_the_sampler_and_no_merge_crosses_into_the_answer():
  # A tokenizer that merges '=2' into one token would change the prompt if both were encoded at once.
  merging = T._replace(
    encode=lambda text: [99] if text == '1+1=2' else T.encode(text), vocab_size=100
  )
  prompt = batching.prompts(SUMS[:1], merging, length=4).tokens[0]
  row = batching.supervised(SUMS[:1], merging, length=6).tokens[0]
  np.testing.assert_array_equal(row[:4], prompt)
  assert row[4:].tolist() == [*T.encode('2'), EOS]


def test_bos_opens_a_sequence_once():
  assert batching.prompts([{'prompt': 'a', 'id': 0}], BYTE, length=2).tokens.tolist() == [[257, 97]]
  writes_bos = BYTE._replace(encode=lambda text: [257, *BYTE.encode(text)])
  got = batching.prompts([{'prompt': 'a', 'id': 0}], writes_bos, length=2)
  assert got.tokens.tolist() == [[257, 97]]


def test_messages_go_through_the_chat_template():
  chat = {'messages': [{'role': 'user', 'content': 'hé'}], 'id': 1}
  plain = {'prompt': 'user: hé\nassistant: ', 'id': 1}
  ours, theirs = (batching.prompts([r], BYTE, length=40) for r in (chat, plain))
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_template_writes_its_own_bos_and_plain_lines_are_given_one():
  writes_none = BYTE._replace(chat=lambda messages, tools=None: 'x')
  record = {'messages': [{'role': 'user', 'content': 'a'}], 'id': 0}
  assert batching.prompts([record], writes_none, length=1).tokens.tolist() == [[120]]
  assert batching.prompts([record], BYTE, length=30).tokens[0, -20] == BYTE.bos_id
  text = {'prompt': 'x', 'id': 0}
  assert batching.prompts([text], writes_none, length=2).tokens.tolist() == [[257, 120]]


TALK = [
  {'role': 'user', 'content': 'a'},
  {'role': 'assistant', 'content': '1'},
  {'role': 'user', 'content': 'b'},
  {'role': 'assistant', 'content': '22'},
]


def test_a_conversation_masks_every_assistant_turn_beside_other_records():
  rows = [{'messages': TALK, 'id': 4}, {'messages': TALK[:1], 'answer': '22', 'id': 5}]
  got = batching.supervised(rows, BYTE, length=60)
  text = b'user: a\nassistant: 1\nuser: b\nassistant: 22'
  size = len(text) + 2
  assert got.tokens[0, :size].tolist() == [BYTE.bos_id, *text, *BYTE.stop_ids]
  trained = [text.index(b'1') + 1, size - 3, size - 2, size - 1]
  assert np.flatnonzero(got.mask[0]).tolist() == trained
  assert np.flatnonzero(got.segment_ids[0]).tolist() == list(range(size))


def test_the_prompt_of_the_last_turn_is_the_prompt_of_the_sampler():
  row = batching.supervised([{'messages': TALK, 'id': 4}], BYTE, length=60)
  asked = batching.prompts([{'messages': TALK[:-1], 'id': 4}], BYTE, length=60)
  prompt = asked.tokens[0, asked.mask[0]]
  np.testing.assert_array_equal(row.tokens[0, : len(prompt)], prompt)
  assert row.mask[0, len(prompt) :][:3].all() and not row.mask[0, len(prompt) - 1]


def test_a_conversation_that_cannot_be_trained_names_its_record():
  with pytest.raises(ValueError, match=r'record 4: .*cannot begin with the assistant'):
    batching.supervised([{'messages': TALK[1:], 'id': 4}], BYTE, length=60)
  with pytest.raises(ValueError, match=r'record 4: 44 tokens, .* limit of 43'):
    batching.supervised([{'messages': TALK, 'id': 4}], BYTE, length=43)
  with pytest.raises(ValueError, match="record 4: 'answer' after messages that end with an assis"):
    batching.supervised([{'messages': TALK, 'answer': 'c', 'id': 4}], BYTE, length=60)
  with pytest.raises(ValueError, match="record 4: no 'answer'"):
    batching.supervised([{'messages': TALK[:3], 'id': 4}], BYTE, length=60)


def test_a_pair_is_a_group_of_two_with_chosen_first():
  rows = [
    {'prompt': 'a', 'chosen': '1', 'rejected': '22', 'id': 5},
    {'prompt': 'bb', 'chosen': '4', 'rejected': '3', 'id': 6},
  ]
  got = batching.pairs(rows, T, length=6)
  assert got.label.tolist() == [1, 0, 1, 0]
  assert got.group_ids.tolist() == [0, 0, 1, 1]
  assert [T.decode(row) for row in got.tokens] == ['a1', 'a22', 'bb4', 'bb3']
  assert got.mask.sum(axis=1).tolist() == [2, 3, 2, 2]
  assert (got.label.dtype, got.group_ids.dtype) == (np.float32, np.int32)


def test_a_pair_to_learn_revisions_from_is_six_rows_of_three_prompts():
  record = {'prompt': '1+1=', 'chosen': '2', 'rejected': '3', 'id': 0}
  got = batching.revisions([record], T, length=14)
  prompts = ['1+1='] * 2 + ['1+1=31+1='] * 2 + ['1+1=21+1='] * 2
  for row, (prompt, own) in enumerate(zip(prompts, '232323')):
    own = [*T.encode(own), EOS]
    assert got.tokens[row, got.mask[row]].tolist() == own
    assert got.tokens[row, got.segment_ids[row] == 1].tolist() == T.encode(prompt) + own
  assert got.label.tolist() == [1, 0] * 3
  assert got.features['shown_label'].tolist() == [-1, -1, 0, 0, 1, 1]
  assert got.group_ids.tolist() == [0] * 6
  with pytest.raises(batching.TooLong, match='record 0: 11 tokens'):
    batching.revisions([record], T, length=10)
  with pytest.raises(batching.Unusable, match='record 0: chosen and rejected have the same tokens'):
    batching.revisions([{**record, 'rejected': '2'}], T, length=14)


def test_a_revision_is_asked_for_in_the_next_turn_as_a_chat_would_be():
  """What `polgrad.sample --chat` samples from is what the rows of the reviser begin with."""
  assert not doctest.testmod(batching).failed
  asked = [{'role': 'user', 'content': '1+1?'}]
  record = {'messages': asked, 'previous_steps': 'Well, ', 'chosen': '2', 'rejected': '3', 'id': 0}
  got = batching.revisions([record], BYTE, length=120, request='Better!')
  shown = [{'role': 'assistant', 'content': 'Well, 3'}, {'role': 'user', 'content': 'Better!'}]
  begin = BYTE.encode(BYTE.chat(asked + shown) + 'Well, ')
  begin = [BYTE.bos_id, *begin] if BYTE.bos_id >= 0 else begin
  row = got.tokens[2, got.segment_ids[2] == 1].tolist()
  assert row == begin + got.tokens[2, got.mask[2]].tolist()
  assert got.tokens[2, got.mask[2]].tolist() == [*BYTE.encode('2'), BYTE.stop_ids[0]]


def test_pairs_with_a_prompt_length_begin_their_completions_at_that_column():
  rows = [
    {'prompt': 'a', 'chosen': '1', 'rejected': '22', 'id': 5},
    {'prompt': 'bb', 'chosen': '4', 'rejected': '3', 'id': 6},
  ]
  plain = batching.pairs(rows, T, length=6)
  got = batching.pairs(rows, T, length=6, prompt_length=3)
  for i, start in enumerate([2, 2, 1, 1]):
    for x, y in zip((got.tokens, got.segment_ids, got.mask), _rows(plain)):
      np.testing.assert_array_equal(x[i], np.roll(y[i], start))
  assert not got.mask[:, :3].any()
  assert got.mask[:, 3].all()
  with pytest.raises(ValueError, match='record 6: 2 tokens, longer than the limit of 1'):
    batching.pairs(rows, T, length=6, prompt_length=1)
  with pytest.raises(ValueError, match='record 5: 6 tokens, longer than the limit of 5'):
    batching.pairs(rows, T, length=5, prompt_length=3)


def _rows(batch):
  return batch.tokens, batch.segment_ids, batch.mask


@pytest.mark.parametrize(
  ('make', 'size'), [(batching.prompts, 5), (batching.supervised, 9), (batching.pairs, 9)]
)
def test_too_long_is_an_error_with_id_and_limit_and_exactly_fitting_is_not(make, size):
  rows = [{'prompt': '99+1=', 'answer': '100', 'chosen': '100', 'rejected': '1', 'id': 42}]
  assert make(rows, T, length=size).tokens.shape[1] == size
  with pytest.raises(ValueError, match=rf'record 42: {size} tokens, .* limit of {size - 1}'):
    make(rows, T, length=size - 1)


def test_an_empty_prompt_and_a_missing_completion_are_errors():
  with pytest.raises(ValueError, match='record 1: the prompt has no tokens'):
    batching.supervised([{'prompt': '', 'answer': '1', 'id': 1}], T, length=4)
  with pytest.raises(ValueError, match="record 1: no 'answer'"):
    batching.supervised([{'prompt': 'a', 'id': 1}], T, length=4)


@pytest.mark.parametrize('field', ['prompt', 'answer'])
def test_characters_without_a_token_are_refused_with_their_record(field):
  record = {'prompt': '1+1=', 'answer': '2', 'id': 9, field: '1*1'}
  with pytest.raises(ValueError, match=r"record 9: \['\*'\] in"):
    batching.supervised([record], T, length=20)
