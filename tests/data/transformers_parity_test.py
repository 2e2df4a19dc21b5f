"""Token ids are those of transformers: of texts, prompts, conversations and their masks."""

import numpy as np
import pytest
import transformers

from polgrad.data import batching, tokenizers
from tests.data import folders

TEXTS = [
  'Hello world',
  'naïve café e\u0301',
  '日本語 Ω',
  '👩‍👩‍👧 ok 😀',
  'two  spaces\n\n\ttab and end  ',
  'line\r\nend\n',
  'a\u00a0b\u2028c',
  'The answer is 42!<|im_end|><end_of_turn></s><|extra|> more<|extra|>',
]
SPACED = [' leading', '   ', '\n\n']  # where the Llama tokenizer of transformers loses a space
USER = [{'role': 'user', 'content': 'Hello, how are you?'}]
CHATS = [
  USER,
  [
    *USER,
    {'role': 'assistant', 'content': 'I am well.'},
    {'role': 'user', 'content': ' naïve café 👩\n\nend '},
  ],
]
SPOKEN = [
  *CHATS[1],
  {'role': 'assistant', 'content': 'The answer\nis 42! 😀'},
]
MAKE = {
  'chatml': folders.chatml,
  'llama3': folders.llama3,
  'gemma': folders.gemma,
  'llama2': folders.llama2,
  'llama2-legacy': lambda folder: folders.llama2(folder, legacy=True),
}


@pytest.fixture(scope='module', params=[*MAKE, 'smollm2'])
def both(request, tmp_path_factory):
  """(ours, theirs, name) of one folder."""
  if request.param == 'smollm2':
    folder = request.getfixturevalue('smollm2')
  else:
    folder = MAKE[request.param](tmp_path_factory.mktemp(request.param))
  ours = tokenizers.huggingface(path=str(folder))
  return ours, transformers.AutoTokenizer.from_pretrained(folder), request.param


def texts(name):
  return TEXTS if name.startswith('llama2') else TEXTS + SPACED


def prompt(tokenizer, **record):
  got = batching.prompts([{**record, 'id': 0}], tokenizer, length=400)
  return got.tokens[0, got.mask[0]].tolist()


def test_text_becomes_the_same_ids(both):
  ours, theirs, name = both
  for text in ['', *texts(name)]:
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_a_text_prompt_is_what_transformers_gives_the_model_bos_included(both):
  ours, theirs, name = both
  assert (ours.bos_id >= 0) == (name not in ('chatml', 'smollm2'))
  for text in texts(name):
    assert prompt(ours, prompt=text) == theirs(text).input_ids, text


def test_ids_become_the_same_text_again_without_stop_pad_and_bos(both):
  ours, theirs, name = both
  hidden = {*ours.stop_ids, ours.pad_id, theirs.bos_token_id}
  for text in texts(name):
    ids = theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode([i for i in ids if i not in hidden]), text


def test_text_without_special_tokens_survives(both):
  ours, _, _ = both
  for text in ['', *TEXTS[:-1], *SPACED]:
    assert ours.decode(ours.encode(text)) == text


def test_a_chat_prompt_is_what_transformers_gives_the_model_with_one_bos_at_most(both):
  ours, theirs, name = both
  for messages in CHATS:
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    got = prompt(ours, messages=messages)
    assert got == expected
    if ours.bos_id >= 0 and not name.startswith('llama2'):  # there bos opens every exchange
      assert got.count(ours.bos_id) == 1


def test_a_conversation_has_the_ids_of_the_whole_text_up_to_its_last_stop_token(both):
  ours, theirs, _ = both
  expected = theirs.apply_chat_template(SPOKEN, return_dict=False)
  ids, trained = ours.conversation(SPOKEN)
  assert ids == expected[: len(ids)]
  assert ids[-1] == ours.stop_ids[0] and trained[-1]
  assert not theirs.decode(expected[len(ids) :]).strip()


def test_special_and_added_tokens_count_into_the_vocabulary(both):
  ours, theirs, _ = both
  assert ours.vocab_size == len(theirs)
  assert all(ours.encode(t) == [theirs.convert_tokens_to_ids(t)] for t in theirs.all_special_tokens)
  assert theirs.eos_token_id in ours.stop_ids


def test_marks_of_a_template_train_what_transformers_masks(tmp_path):
  folder = folders.chatml(tmp_path, folders.MARKED)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  expected = theirs.apply_chat_template(SPOKEN, return_dict=True, return_assistant_tokens_mask=True)
  ids, trained = tokenizers.huggingface(path=str(folder)).conversation(SPOKEN)
  assert ids == expected['input_ids'][: len(ids)]
  np.testing.assert_array_equal(trained, expected['assistant_masks'][: len(ids)])
  assert not any(expected['assistant_masks'][len(ids) :])
