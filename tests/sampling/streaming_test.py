"""Streaming draws what the sampler draws, and its text is never broken."""

import doctest
import functools

import jax
import numpy as np
import pytest

from polgrad.data import tokenizers
from polgrad.sampling import behavior_policies, make_sampler, streaming
from polgrad.sampling.streaming import Streamer, Text
from tests.data import folders
from tests.models import tiny

POLICY, PARAMS = tiny.policy(), tiny.params()
STOPS = (3,)
# Each prompt begins with what was read before, in part or whole; the last one is shorter.
BEGIN = [*range(4, 15)]
PROMPTS = [BEGIN, [*BEGIN, 9, 9, 9, 8, 7], [4, 5, *BEGIN], range(4, 22), [*BEGIN, 9]]


said = []  # notes of the streamer


@pytest.fixture(scope='module')
def stream():
  """Chunks and caches of a few tokens, so that prompts take several, and caches grow."""
  with pytest.MonkeyPatch.context() as patch:
    for name, size in dict(CHUNK=4, SMALLEST=16, AHEAD=2).items():
      patch.setattr(streaming, name, size)
    yield Streamer(POLICY, PARAMS, stop_ids=STOPS, temperature=1.3, top_k=9, note=said.append)


def test_streamed_tokens_are_those_of_the_sampler(stream):
  sample = make_sampler(
    {'policy': POLICY}, max_new_tokens=12, stop_ids=STOPS, temperature=1.3, top_k=9
  )
  for turn, prompt in enumerate(map(list, PROMPTS)):
    tokens = np.array([[0] * (20 - len(prompt)) + prompt])
    mask = np.arange(20)[None] >= 20 - len(prompt)
    rows = (tokens, mask, np.array([turn]))
    whole = jax.device_get(sample({'policy': PARAMS}, *rows, seed=5, step=turn))
    found = list(stream(prompt, max_new_tokens=12, seed=5, turn=turn))
    assert found == whole.tokens[whole.mask].tolist(), turn
  assert said == [f'compiling for conversations of up to {n} tokens ...' for n in (16, 32)]


def test_an_interrupted_completion_leaves_a_cache_that_the_next_one_uses(stream):
  pieces = stream([4, 5, 6], max_new_tokens=9, seed=0, turn=0)
  prompt = [4, 5, 6, next(pieces), next(pieces), 7]
  ask = dict(max_new_tokens=9, seed=0, turn=1)
  found = list(stream(prompt, **ask))
  list(stream([9, 9, 9], **ask))  # nothing of the prompt is left
  assert list(stream(prompt, **ask)) == found


def test_a_completion_ends_where_the_model_can_read_no_more(stream):
  made = list(stream([5] * 60, max_new_tokens=10, seed=0, turn=0))
  assert len(made) == 4 or made[-1] in STOPS
  with pytest.raises(ValueError, match='64 tokens: the model reads 64 with the answer'):
    list(stream([5] * 64, max_new_tokens=10, seed=0, turn=0))


def test_a_scorer_steers_what_is_streamed_as_it_steers_the_sampler():
  model, prompt = tiny.policy(num_layers=1), list(PROMPTS[1])
  base, scorer = (tiny.params(seed, num_layers=1) for seed in (0, 1))
  steered = functools.partial(behavior_policies.controlled, strength=2.0)
  sample = make_sampler(
    {'reference': model, 'scorer': model},
    behavior_policy=steered,
    max_new_tokens=8,
    temperature=1.3,
  )
  rows = (np.array([prompt]), np.ones((1, len(prompt)), bool), np.array([0]))
  whole = jax.device_get(sample({'reference': base, 'scorer': scorer}, *rows, seed=5, step=0))
  stream = Streamer(model, base, temperature=1.3, scorer=(model, scorer), strength=2.0)
  found = list(stream(prompt, max_new_tokens=8, seed=5, turn=0))
  assert found == whole.tokens[whole.mask].tolist()


TEXTS = ['Hello world', 'naïve 東京 🙂🙂 café', '', '🙂', ' \n a']


@pytest.mark.parametrize('make', [None, folders.gemma, folders.llama2, folders.llama3])
def test_streamed_text_is_the_whole_text_and_no_character_is_broken(make, tmp_path):
  tokenizer = tokenizers.huggingface(path=str(make(tmp_path))) if make else tokenizers.byte()
  for wanted in TEXTS:
    ids = tokenizer.encode(wanted)
    text = Text(tokenizer.decode)
    pieces = [text.add(i) for i in ids]
    assert not any('�' in piece for piece in pieces)
    assert ''.join(pieces) + text.close() == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_written_as_the_tokenizer_writes_it():
  text = Text(functools.partial(tokenizers.byte().decode))
  assert [text.add(i) for i in '🙂'.encode()[:2]] == ['', '']
  assert text.close() == '�'


@pytest.mark.parametrize(
  ('whole', 'stops', 'given'),
  [
    ('one two', ['two'], 'one '),
    ('one twice', ['two'], 'one twice'),
    ('ababac', ['abac'], 'ab'),
    ('xyz', ['yz', 'xy'], ''),
    ('one tw', ['two'], 'one tw'),
  ],
)
def test_a_text_ends_before_a_stop_string_of_which_nothing_is_given_away(whole, stops, given):
  text = Text(tokenizers.byte().decode, stops)
  pieces = [text.add(i) for i in whole.encode()]
  assert ''.join(pieces) + text.close() == given
  assert text.ended == (given != whole)
  assert all(given.startswith(''.join(pieces[:n])) for n in range(len(pieces)))


def test_the_example_of_the_docstring_is_true():
  assert doctest.testmod(streaming).attempted == 3 and not doctest.testmod(streaming).failed
