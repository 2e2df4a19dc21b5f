"""Stop strings: the table of a vocabulary finds what a search in the decoded text finds."""

import doctest

import jax
import numpy as np
import pytest

from polgrad import build, evaluate
from polgrad.collect import completions
from polgrad.data import stops, tokenizers
from polgrad.options import from_text
from polgrad.registry import part, weighted
from polgrad.sampling import make_sampler
from polgrad.sampling.stopping import stop_table
from polgrad.types import Batch
from tests.data import folders
from tests.models import tiny

STRINGS = ('</answer>', '\n\nQuestion:', 'ab', 'aab', ' é👩', '!', '\n```')
TEXTS = [
  *(
    'The answer is </answer> yes',
    'x</answer',
    '</answ</answer>',
    'a\n\n\nQuestion: b',
    'cab',
    'aaab',
  ),
  *('na é👩 ve', 'é 👩', 'caab', 'wow!!! no', 'code\n```\nend', '\n``', 'Questions', ' </ answer>'),
]


def first_stop(tokenizer, ids):
  """How many tokens a row has when its decoded text contains a stop string, None if it never does."""
  text = lambda n: tokenizer.decode(ids[:n])
  counts = range(1, len(ids) + 1)
  return next((n for n in counts if any(s in text(n) for s in tokenizer.stop_strings)), None)


def found_stop(table, ids):
  """The same by the table."""
  state = table.start
  for count, i in enumerate(ids, start=1):
    state = table.following[state, i]
    if state == table.end:
      return count
  return None


def rows_of(tokenizer, random):
  """Tokens of texts, cut and joined anywhere, and tokens at random, among them those of the strings."""
  near = sorted({i for text in (*STRINGS, *TEXTS) for i in tokenizer.encode(text)})
  near += [*tokenizer.stop_ids, tokenizer.pad_id]
  rows = [tokenizer.encode(text) for text in TEXTS]
  rows += [[*a[random.integers(4) :], *b] for a in rows for b in rows]
  rows += [random.choice(near, 12).tolist() for _ in range(300)]
  return rows + [random.integers(0, tokenizer.vocab_size, 12).tolist() for _ in range(100)]


def assert_exact(tokenizer):
  tokenizer = tokenizer.sampling('', STRINGS)
  table = stop_table(tokenizer, tokenizer.vocab_size + 3)
  rows = rows_of(tokenizer, np.random.default_rng(0))
  wanted = [first_stop(tokenizer, ids) for ids in rows]
  assert [found_stop(table, ids) for ids in rows] == wanted
  assert sum(n is not None for n in wanted) > 50 and wanted.count(None) > 10
  return table


def test_the_table_of_a_real_vocabulary_finds_what_the_decoded_text_holds(smollm2):
  tokenizer = tokenizers.huggingface(path=smollm2)
  table = assert_exact(tokenizer)
  states = sum(len(s.encode()) for s in STRINGS) + 3  # less what strings have in common
  assert len(table.following) < states and table.following.dtype == np.uint8
  # Tokens that hold a string inside, or only its last part.
  one = stop_table(tokenizer.sampling('', ('tio',)), tokenizer.vocab_size)
  [inside] = tokenizer.encode(' nation')
  assert one.following[one.start, inside] == one.end


@pytest.mark.parametrize('family', ['chatml', 'llama3', 'gemma'])
def test_the_table_is_exact_in_every_family_of_decoders(tmp_path, family):
  folder = getattr(folders, family)(tmp_path)
  tokenizer = tokenizers.huggingface(path=str(folder))
  if family == 'gemma':  # half of a character in bytes hides what is beside it
    whole = lambda ids: all('\ufffd' not in tokenizer.decode(ids[:n]) for n in range(len(ids) + 1))
    tokenizer = tokenizer.sampling('', STRINGS)
    table = stop_table(tokenizer, tokenizer.vocab_size)
    rows = [ids for ids in rows_of(tokenizer, np.random.default_rng(0)) if whole(ids)]
    assert len(rows) > 100
    assert [found_stop(table, i) for i in rows] == [first_stop(tokenizer, i) for i in rows]
  else:
    assert_exact(tokenizer)


def test_bytes_and_characters_have_tables():
  assert_exact(tokenizers.byte())
  tokenizer = tokenizers.characters(alphabet='12+=').sampling('', ('1+', '='))
  table = stop_table(tokenizer, tokenizer.vocab_size)
  rows = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (200, 6)).tolist()
  assert [found_stop(table, i) for i in rows] == [first_stop(tokenizer, i) for i in rows]


def test_the_examples_of_the_docstrings_are_true():
  found = doctest.testmod(stops)
  assert found.attempted == 2 and not found.failed


def test_the_space_that_a_decoder_drops_at_the_beginning_is_not_seen():
  ids = {'▁a': 0, 'b': 1, '▁': 2, '': 3}
  for decoder in (
    {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always'},
    {'type': 'Sequence', 'decoders': [
      {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'},
      {'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0},
    ]},
  ):  # fmt: skip
    pieces = tokenizers._pieces_of(decoder, ids)
    bare = tokenizers.byte()._replace(pieces=lambda first, p=pieces: p({3}, first))
    table = stop_table(bare.sampling('', (' a',)), 4)
    rows = ([0], [3, 0], [2, 0], [1, 0], [0, 0])
    assert [found_stop(table, ids) for ids in rows] == [None, None, 2, 2, 2]


@pytest.mark.parametrize(
  ('strings', 'why'),
  [
    (('',), "not empty, got ''"),
    ((3,), 'got 3'),
    (('a' * 300,), '300 bytes in all, more than 253'),
  ],
)
def test_stop_strings_without_a_meaning_are_refused_with_their_place(strings, why):
  config = from_text('method=grpo,task=addition,model=tiny,smoke')
  config.phases.train.collect.stop_strings = strings
  with pytest.raises(ValueError, match=rf'config.phases.train.collect.stop_strings: .*{why}'):
    build.build(config)


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(tmp_path):
  tokenizer = tokenizers.huggingface(path=str(folders.llama2(tmp_path)))
  with pytest.raises(ValueError, match='bytes of single tokens are unknown'):
    stop_table(tokenizer.sampling('', ('a',)), tokenizer.vocab_size)


ALPHABET = ''.join(chr(97 + i) for i in range(tiny.VOCAB - 2))


def test_a_row_ends_at_the_token_that_completes_a_stop_string_and_is_otherwise_the_same():
  policy, params = tiny.policy(num_layers=1), tiny.params(num_layers=1)
  tokenizer = tokenizers.characters(alphabet=ALPHABET).sampling('', ('ab', 'c', 'dd', 'ef'))
  table = stop_table(tokenizer, tiny.VOCAB)
  settings = dict(max_new_tokens=9, samples_per_prompt=12, stop_ids=(1,), slots=4, temperature=2.0)
  tokens, mask = tiny.rows(0, 2, 4), np.ones((2, 4), bool)
  draw = lambda **more: make_sampler({'policy': policy}, **settings, **more)(
    {'policy': params}, tokens, mask, np.arange(2), seed=0, step=0
  )
  free, stopped = jax.device_get((draw(), draw(stop_table=table)))
  for i in range(24):
    ids = free.tokens[i][free.mask[i]].tolist()
    count = found_stop(table, ids) or len(ids)
    row = np.flatnonzero(stopped.mask[i])
    assert stopped.tokens[i][row].tolist() == ids[:count]
    np.testing.assert_allclose(stopped.behavior_logp[i][row], free.behavior_logp[i][row], rtol=1e-6)
    assert stopped.finished[i] == (found_stop(table, ids) is not None or ids[count - 1] == 1)
  assert sum(found_stop(table, r[m].tolist()) is not None
                 for r, m in zip(free.tokens, free.mask)) > 3  # fmt: skip
  assert stopped.tokens[0, 4:][~stopped.mask[0, 4:]].tolist().count(0) == 9 - stopped.mask[0].sum()


def test_the_text_ends_with_the_stop_string_though_its_token_has_more_text(smollm2):
  tokenizer = tokenizers.huggingface(path=smollm2).sampling('Well', ('tio', 'xyz'))
  ids = tokenizer.encode(', a nation')
  batch = Batch(
    tokens=np.array([ids]),
    segment_ids=np.ones((1, len(ids)), int),
    mask=np.ones((1, len(ids)), bool),
    finished=np.array([True]),
  )
  assert completions(batch, [{'prompt': 'q'}], tokenizer) == ['Well, a natio']


def reads_all(completion, record, length, prompt, tokens):
  """1 if the arguments belong together: characters are tokens, and the last one may be eos."""
  assert prompt == record['prompt'] + '1+' and completion.startswith('1+'), (prompt, completion)
  assert length == len(tokens) and len(completion) - 2 in (length, length - (tokens[-1] == 1))
  return float('=' not in completion[:-1])


def test_an_evaluation_samples_after_the_prefix_and_verifiers_see_it():
  config = from_text(
    'method=grpo,task=addition,model=tiny,smoke,warm_start=0,prefix=1+,stop_strings=='
  )
  collector = config.phases.train.collect
  assert (collector.prefix, collector.stop_strings) == ('1+', ('=',))
  assert collector.prompt_length == 8 == config.evaluation.prompt_length
  config.evaluation.reward = {'all': weighted(1.0, part(reads_all))}
  config.evaluation.isolate_verifiers = False
  experiment = build.build(config)
  params = experiment.policy.init(jax.random.key(0))
  found, samples = evaluate.make_evaluator(experiment)(params)
  assert found['evaluation/reward'] == 1 and not found['evaluation/verifier_errors']
  assert all(text.startswith('1+') for _, text, _ in samples)
