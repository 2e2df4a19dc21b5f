"""Tokenizers: text survives, special tokens stay out of it, and templates write what they should."""

import json
import pathlib
import shutil

import pytest
import sentencepiece as spm
import tokenizers as hf

from polgrad.data import batching, tokenizers
from polgrad.registry import bind, part
from tests.data import folders
from tests.data.folders import CHATML

TEXTS = ['', 'plain', '12+34=', 'naïve café', '日本語', '👩‍👩‍👧 ok', ' two  spaces\n\ttab']
HELLO = [{'role': 'user', 'content': 'Hello'}]


@pytest.fixture
def folder(tmp_path):
  """A byte-level BPE with ChatML tokens: 0 <pad>, 1 <|im_start|>, 2 <|im_end|>, 3 <eos>, 4 <s>."""
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<pad>', '<|im_start|>', '<|im_end|>', '<eos>', '<s>'],
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(['Hello hello world'] * 3, trainer)
  model.save(str(tmp_path / 'tokenizer.json'))
  configure(tmp_path, eos_token='<eos>', pad_token='<pad>', chat_template=CHATML)
  return tmp_path


def configure(folder, **config):
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


@pytest.fixture
def sentences(tmp_path):
  """A sentencepiece model with unk 0, bos 1, eos 2 and no pad."""
  (tmp_path / 'text').write_text('\n'.join(['Hello world', 'a b c d e f', '0123456789'] * 5))
  spm.SentencePieceTrainer.train(
    input=str(tmp_path / 'text'),
    model_prefix=str(tmp_path / 'sp'),
    vocab_size=60,
    hard_vocab_limit=False,
    byte_fallback=False,
    minloglevel=2,
  )
  return tmp_path / 'sp.model'


@pytest.mark.parametrize('text', TEXTS)
def test_byte_text_survives(text):
  byte = tokenizers.byte()
  assert byte.decode(byte.encode(text)) == text
  assert all(0 <= i < 256 for i in byte.encode(text))


def test_byte_decodes_half_a_code_point_to_a_replacement_character():
  byte = tokenizers.byte()
  ids = byte.encode('aé')
  assert byte.decode(ids[:-1]) == 'a\N{REPLACEMENT CHARACTER}'
  assert byte.decode(ids[:-1]) + byte.decode(ids[-1:]) != 'aé'
  assert byte.decode(ids[:-1] + ids[-1:]) == 'aé'


def test_every_byte_sequence_decodes():
  byte = tokenizers.byte()
  for i in range(byte.vocab_size):
    assert isinstance(byte.decode([i, 255 - i % 256]), str)


@pytest.mark.parametrize('make', [tokenizers.byte, lambda: tokenizers.characters(alphabet='ab')])
def test_special_tokens_are_apart_from_text_and_leave_none(make):
  t = make()
  special = {t.pad_id, t.bos_id, *t.stop_ids} - {-1}
  assert not special & set(t.encode('ab'))
  assert all(0 <= i < t.vocab_size for i in special)
  assert t.decode([*t.stop_ids, *t.encode('ab'), t.pad_id, t.bos_id]) == 'ab'


def test_characters_are_numbered_after_pad_and_eos():
  t = tokenizers.characters(alphabet='0123456789+=')
  assert t.encode('1+1=') == [3, 12, 3, 13]
  assert t.decode(t.encode('12+34=')) == '12+34='
  assert (t.vocab_size, t.pad_id, t.bos_id, t.stop_ids) == (14, 0, -1, (1,))


def test_a_character_outside_the_alphabet_is_named():
  with pytest.raises(ValueError, match=r"\['\*'\]"):
    tokenizers.characters(alphabet='01').encode('0*1')
  with pytest.raises(ValueError, match=r"\['a'\] more than once"):
    tokenizers.characters(alphabet='aba')


def test_sentencepiece_adds_no_special_token_and_survives(sentences):
  t = tokenizers.sentencepiece(path=str(sentences))
  ids = t.encode('Hello world')
  assert not {t.bos_id, *t.stop_ids} & set(ids)
  assert t.decode(ids) == 'Hello world'
  assert t.decode([t.bos_id, *ids, *t.stop_ids]) == 'Hello world'
  assert (t.bos_id, t.stop_ids) == (1, (2,))


def test_sentencepiece_without_a_pad_token_pads_with_eos(sentences):
  assert tokenizers.sentencepiece(path=str(sentences)).pad_id == 2


def test_a_turn_is_trained_from_where_the_ids_of_its_prompt_end(sentences):
  # The model drops the last space of the prompt, and writes it again before the turn.
  t = tokenizers.sentencepiece(path=str(sentences))
  prompt = t.encode(t.chat(HELLO))
  ids, trained = t.conversation([*HELLO, {'role': 'assistant', 'content': '👩'}])
  assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 3
  assert trained == [False] * len(prompt) + [True] * 3


@pytest.mark.parametrize('text', TEXTS)
def test_huggingface_text_survives(folder, text):
  t = tokenizers.huggingface(path=str(folder))
  assert t.decode(t.encode(text)) == text


def test_huggingface_chat_writes_special_tokens_that_encode_reads(folder):
  t = tokenizers.huggingface(path=str(folder))
  text = t.chat(HELLO)
  assert text == '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n'
  ids = t.encode(text)
  assert (ids[0], ids.count(1), ids.count(2)) == (1, 2, 1)
  assert t.decode(ids) == '<|im_start|>user\nHello\n<|im_start|>assistant\n'


def test_a_template_file_wins_over_the_configuration(folder):
  (folder / 'chat_template.jinja').write_text("{{ messages[0]['content'] | upper }}")
  assert tokenizers.huggingface(path=str(folder)).chat(HELLO) == 'HELLO'


def test_of_named_templates_the_default_speaks(folder):
  named = [{'name': 'tools', 'template': 'no'}, {'name': 'default', 'template': 'yes'}]
  configure(folder, eos_token='<eos>', chat_template=named)
  assert tokenizers.huggingface(path=str(folder)).chat(HELLO) == 'yes'


@pytest.mark.parametrize(
  ('template', 'written'),
  [
    ('{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n', '  Hello\n'),
    ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
    ('{{ bos_token }}{{ eos_token }}', '<s><eos>'),
    ('{% if tools is not none %}tools{% endif %}none', 'none'),
    ('{% generation %}a{% endgeneration %}\n{%- generation -%} b {%- endgeneration -%}', 'ab'),
    ('{% for m in [1, 2] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}', '1'),
    ("{{ strftime_now('%%') }}", '%'),
  ],
)
def test_templates_find_the_helpers_that_they_were_written_for(folder, template, written):
  bos = {'content': '<s>', 'special': True}  # either form is in use
  configure(folder, eos_token='<eos>', bos_token=bos, chat_template=template)
  assert tokenizers.huggingface(path=str(folder)).chat(HELLO) == written


def test_a_template_may_refuse_and_may_not_break_out(folder):
  configure(folder, eos_token='<eos>', chat_template="{{ raise_exception('no system role') }}")
  with pytest.raises(ValueError, match='no system role'):
    tokenizers.huggingface(path=str(folder)).chat(HELLO)
  configure(folder, eos_token='<eos>', chat_template='{{ messages.append(1) }}')
  with pytest.raises(Exception, match=r'unsafe|not safely'):
    tokenizers.huggingface(path=str(folder)).chat(HELLO)


def test_without_a_template_chat_says_so(folder):
  configure(folder, eos_token='<eos>')
  with pytest.raises(ValueError, match='no chat template'):
    tokenizers.huggingface(path=str(folder)).chat(HELLO)


@pytest.mark.parametrize(('ids', 'stops'), [(3, (2, 3)), ([3, 4], (2, 3, 4)), ([2, 3], (2, 3))])
def test_stop_ids_join_both_files_with_the_end_of_turn_first(folder, ids, stops):
  configure(folder, eos_token='<|im_end|>', chat_template=CHATML)
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids}))
  assert tokenizers.huggingface(path=str(folder)).stop_ids == stops


def test_the_end_of_turn_comes_first_even_if_another_token_is_called_eos(folder):
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [3, 2]}))
  assert tokenizers.huggingface(path=str(folder)).stop_ids == (2, 3)


def test_special_tokens_may_be_named_in_their_own_file_and_the_configuration_wins(folder):
  configure(folder, pad_token='<eos>', eos_token=None, chat_template=CHATML)
  named = {'eos_token': {'content': '<|im_end|>'}, 'pad_token': '<pad>'}
  (folder / 'special_tokens_map.json').write_text(json.dumps(named))
  t = tokenizers.huggingface(path=str(folder))
  assert (t.stop_ids, t.pad_id) == ((2,), 3)


@pytest.mark.parametrize('eos', ['<eos>', None])
def test_the_token_with_which_the_template_ends_a_turn_stops_though_no_file_names_it(folder, eos):
  configure(folder, eos_token=eos, chat_template=CHATML)
  t = tokenizers.huggingface(path=str(folder))
  assert t.stop_ids == ((2, 3) if eos else (2,))
  # Some templates write the end of the text after that of the turn.
  text = CHATML.replace('{% if add', "{{ '<eos>' }}{% if add")
  configure(folder, eos_token='<eos>', chat_template=text)
  assert tokenizers.huggingface(path=str(folder)).stop_ids == (2, 3)


def test_a_turn_that_ends_with_no_token_of_its_own_ends_with_eos(folder):
  text = CHATML.replace('<|im_end|>', '###')
  configure(folder, eos_token='<eos>', chat_template=text)
  assert tokenizers.huggingface(path=str(folder)).stop_ids == (3,)


def test_a_base_model_with_the_template_of_smollm2_stops_at_the_turn_and_at_eos(smollm2, tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    shutil.copy(pathlib.Path(smollm2) / name, tmp_path / name)
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  configure(tmp_path, **config | {'eos_token': '<|endoftext|>'})
  t = tokenizers.huggingface(path=str(tmp_path))
  assert t.stop_ids == (2, 0)
  record = {'messages': HELLO, 'answer': 'Hi', 'id': 0}
  row = batching.supervised([record], t, length=60)
  assert row.tokens[0, row.mask[0]].tolist() == [*t.encode('Hi'), 2]


def test_only_stop_pad_and_bos_tokens_are_left_out_of_a_decoded_text(folder):
  model = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tags = ['<think>', '</think>', '<answer>', '</answer>']
  model.add_special_tokens(tags)
  model.save(str(folder / 'tokenizer.json'))
  configure(folder, eos_token='<eos>', pad_token='<pad>', bos_token='<s>', chat_template=CHATML)
  t = tokenizers.huggingface(path=str(folder))
  text = '<think>so</think>\n<answer>4</answer>'
  ids = t.encode(text)
  assert {model.token_to_id(tag) for tag in tags} <= set(ids)
  assert t.decode([t.pad_id, *t.encode('<s>'), *ids, *t.stop_ids]) == text


@pytest.mark.parametrize('kind', ['control_symbols', 'user_defined_symbols'])
def test_tokens_of_a_sentencepiece_model_for_thoughts_are_decoded(tmp_path, kind):
  (tmp_path / 'text').write_text('\n'.join(['Hello world', 'a b c d e f', '0123456789'] * 5))
  spm.SentencePieceTrainer.train(
    input=str(tmp_path / 'text'),
    model_prefix=str(tmp_path / 'tokenizer'),
    vocab_size=60,
    hard_vocab_limit=False,
    minloglevel=2,
    **{kind: ['<think>', '</think>']},
  )
  path = tmp_path / 'tokenizer.model'
  model = spm.SentencePieceProcessor(model_file=str(path))
  think, end = model.piece_to_id(['<think>', '</think>'])
  for t in (tokenizers.sentencepiece(path=str(path)), tokenizers.huggingface(path=str(tmp_path))):
    ids = [t.bos_id, think, *t.encode('a b'), end, *t.encode('c'), *t.stop_ids]
    assert t.decode(ids).replace(' ', '') == '<think>ab</think>c'


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
  ('template', 'opening'),
  [
    (CHATML, ''),
    (folders.THOUGHTS, ''),
    (folders.GEMMA, ''),
    (folders.LLAMA2, ''),
    # Thoughts are opened; earlier turns have none, an empty block, or are opened alike.
    (CHATML.replace("assistant\n'", "assistant\n<think>\n'"), '<think>\n'),
    (folders.THOUGHTS.replace("assistant\n'", "assistant\n<think>\n'"), '<think>\n'),
    (folders.THOUGHTS.replace(' and not loop.last', '').replace("assistant\n'", "assistant\n<think>'"),
     '<think>'),
    # No thoughts are wanted: the prompt closes them at once.
    (CHATML.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'"),
     '<think>\n\n</think>\n\n'),
    # Earlier turns begin with the end of thoughts, which has its first letter in common.
    ("{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot></think>' }}{{ m.content }}"
     "{% endfor %}{% if add_generation_prompt %}{{ '<bot><think>' }}{% endif %}", '<think>'),
    # The tag is also in a system turn.
    ('Use <think>. ' + CHATML.replace("assistant\n'", "assistant\n[THINK]'"), '[THINK]'),
    ("{{ raise_exception('no') }}", ''),
  ],
)  # fmt: skip
def test_what_the_generation_prompt_writes_of_the_turn_is_told(folder, template, opening):
  configure(folder, eos_token='<eos>', chat_template=template)
  assert tokenizers.huggingface(path=str(folder)).opening == opening


def test_a_template_that_prints_the_date_prints_that_of_the_configuration(folder, monkeypatch):
  configure(folder, eos_token='<eos>', chat_template="{{ strftime_now('%d %b %Y') }}")
  chat = lambda **date: tokenizers.huggingface(path=str(folder), **date).chat(HELLO)
  assert chat(date='2025-03-01') == '01 Mar 2025'
  assert chat() == '26 Jul 2024'
  with pytest.raises(ValueError, match='tomorrow'):
    chat(date='tomorrow')


def test_options_reach_the_template_and_others_are_refused_with_those_that_it_reads(folder):
  reads = '{{ bos_token }}{{ style }}{% if deep is defined %}{{ deep }}{% endif %}' + CHATML
  configure(folder, eos_token='<eos>', bos_token='<bos>', chat_template=reads)
  make = lambda **options: tokenizers.huggingface(path=str(folder), template_options=options)
  assert make(style='terse', deep=2).chat(HELLO).startswith('<bos>terse2')
  with pytest.raises(
    ValueError, match=r"options.styl: .* did you mean 'style'.*\['deep', 'style'\]"
  ):
    make(styl='terse')
  with pytest.raises(ValueError, match=r'template_options.messages: .* valid: '):
    make(messages=[])


TOOLS = [{'type': 'function', 'function': {'name': 'add'}}]


def test_tools_reach_a_template_that_reads_them_and_are_refused_by_others(folder):
  reads = '{% if tools %}{{ tools | tojson }}{% endif %}' + CHATML
  configure(folder, eos_token='<eos>', chat_template=reads)
  t = tokenizers.huggingface(path=str(folder))
  assert t.chat(HELLO, tools=TOOLS) == json.dumps(TOOLS) + t.chat(HELLO)
  for none in (None, []):
    assert t.chat(HELLO, tools=none) == t.chat(HELLO)
  # An option gives them to records that have none.
  for own in (TOOLS, json.dumps(TOOLS)):
    usual = tokenizers.huggingface(path=str(folder), template_options={'tools': own})
    assert usual.chat(HELLO) == t.chat(HELLO, tools=TOOLS)
    assert usual.chat(HELLO, tools=['b']) == t.chat(HELLO, tools=['b'])
  with pytest.raises(ValueError, match='tools must be a list'):
    tokenizers.huggingface(path=str(folder), template_options={'tools': '{'})
  configure(folder, eos_token='<eos>', chat_template=CHATML)
  t = tokenizers.huggingface(path=str(folder))
  with pytest.raises(ValueError, match='chat template does not read them'):
    t.chat(HELLO, tools=TOOLS)
  with pytest.raises(ValueError, match=r'template_options.tools: .* does not read it'):
    tokenizers.huggingface(path=str(folder), template_options={'tools': TOOLS})
  with pytest.raises(ValueError, match='tools need a tokenizer with a chat template'):
    tokenizers.byte().chat(HELLO, tools=TOOLS)


def test_a_template_of_its_own_writes_records_with_tools(folder):
  named = [
    {'name': 'default', 'template': 'plain'},
    {'name': 'tool_use', 'template': 'T{{ tools }}'},
  ]
  configure(folder, eos_token='<eos>', chat_template=named)
  t = tokenizers.huggingface(path=str(folder))
  assert (t.chat(HELLO), t.chat(HELLO, tools=['a'])) == ('plain', "T['a']")
  (folder / 'additional_chat_templates').mkdir()
  (folder / 'additional_chat_templates' / 'tool_use.jinja').write_text('F{{ tools }}')
  assert tokenizers.huggingface(path=str(folder)).chat(HELLO, tools=['a']) == "F['a']"


def test_no_stop_token_is_an_error(folder):
  configure(folder)
  with pytest.raises(ValueError, match='no stop token'):
    tokenizers.huggingface(path=str(folder))


def test_bos_counts_only_where_the_tokenizer_opens_text_with_it(folder):
  configure(folder, eos_token='<eos>', bos_token='<s>')
  assert tokenizers.huggingface(path=str(folder)).bos_id == -1
  model = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  model.post_processor = hf.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 4)]
  )
  model.save(str(folder / 'tokenizer.json'))
  t = tokenizers.huggingface(path=str(folder))
  assert t.bos_id == 4
  assert 4 not in t.encode('Hello')


def test_the_post_processor_alone_says_whether_bos_opens_text(folder):
  configure(folder, eos_token='<eos>', bos_token='<s>', add_bos_token=True)
  assert tokenizers.huggingface(path=str(folder)).bos_id == -1


def test_a_sentencepiece_model_alone_reads_the_special_tokens_of_its_folder(tmp_path):
  folders.llama2(tmp_path, added=['<|im_start|>', '<|im_end|>'], chat_template=CHATML)
  t = tokenizers.huggingface(path=str(tmp_path))
  start, end = t.encode('<|im_start|><|im_end|>')
  assert (start, end, t.vocab_size) == (end - 1, t.vocab_size - 1, end + 1)
  folders.write(tmp_path, 'generation_config.json', eos_token_id=[2, start, end])
  t = tokenizers.huggingface(path=str(tmp_path))
  assert (t.bos_id, t.pad_id, t.stop_ids) == (1, end, (end, 2, start))
  ids = t.encode(t.chat(HELLO))
  assert ids[0] == start and ids.count(start) == 2 and ids.count(end) == 1
  assert t.decode(ids) == 'user\nHello\nassistant\n'


def test_tokens_added_to_a_sentencepiece_model_are_text_whether_special_or_not(tmp_path):
  folders.llama2(tmp_path)
  folders.write(tmp_path, 'added_tokens.json', **{'<|more|>': 500})
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  shown = {'content': '<tool>', 'special': False, 'rstrip': True}
  config['added_tokens_decoder']['501'] = shown
  configure(tmp_path, **config)
  t = tokenizers.huggingface(path=str(tmp_path))
  assert t.encode('<|more|><tool>  ') == [500, 501]
  assert t.decode(t.encode('Hello<|more|><tool> world')) == 'Hello<|more|><tool>world'
  assert t.vocab_size == 502


def test_a_sentencepiece_model_with_nothing_beside_it_has_its_own_special_tokens(tmp_path):
  folders.llama2(tmp_path)
  (tmp_path / 'tokenizer_config.json').unlink()
  t = tokenizers.huggingface(path=str(tmp_path))
  assert (t.bos_id, t.pad_id, t.stop_ids) == (1, 2, (2,))
  assert t.encode('</s>') == [2]
  with pytest.raises(ValueError, match='no chat template'):
    t.chat(HELLO)


@pytest.mark.parametrize('text', TEXTS)
def test_text_survives_a_sentencepiece_model_with_bytes(tmp_path, text):
  t = tokenizers.huggingface(path=str(folders.llama2(tmp_path)))
  assert t.decode(t.encode(text)) == text
  assert max(t.encode(text), default=0) < t.vocab_size


def test_tokenizer_json_wins_over_tokenizer_model(folder):
  before = tokenizers.huggingface(path=str(folder))
  config = (folder / 'tokenizer_config.json').read_text()
  folders.llama2(folder)
  (folder / 'tokenizer_config.json').write_text(config)
  after = tokenizers.huggingface(path=str(folder))
  assert after.encode('Hello') == before.encode('Hello')
  assert (after.vocab_size, after.stop_ids) == (before.vocab_size, before.stop_ids)


def test_truncation_and_padding_of_the_file_are_not_obeyed(folder):
  model = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  plain = model.encode('Hello hello world').ids
  model.enable_truncation(2)
  model.enable_padding(length=50)
  model.save(str(folder / 'tokenizer.json'))
  assert tokenizers.huggingface(path=str(folder)).encode('Hello hello world') == plain


def test_pad_falls_back_to_a_stop_token(folder):
  configure(folder, eos_token='<eos>')
  t = tokenizers.huggingface(path=str(folder))
  assert t.pad_id == t.stop_ids[0] == 3


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('generation_config', {'eos_token_id': 10**6}, 'eos_token_id must be at least 0 and below 2'),
    ('generation_config', {'eos_token_id': [2, -1]}, 'eos_token_id must be at least 0 .* got -1'),
    ('generation_config', {'eos_token_id': ['2']}, "eos_token_id must be at least 0 .* got '2'"),
    ('generation_config', {'eos_token_id': True}, 'eos_token_id must be at least 0 .* got True'),
    ('generation_config', [2], 'expected an object, got list'),
    ('special_tokens_map', {'eos_token': 3}, 'eos_token must be text, or an object .* got 3'),
    ('special_tokens_map', {'eos_token': {}}, None),
    ('tokenizer_config', {'eos_token': {'text': 'x'}}, 'eos_token must be text, or an object'),
    ('tokenizer_config', {'eos_token': '<eos>', 'chat_template': 3}, 'chat_template must be text'),
    (
      'tokenizer_config',
      {'eos_token': '<eos>', 'chat_template': [{'name': 'default', 'template': 3}]},
      'chat_template must be text, got 3',
    ),
    (
      'tokenizer_config',
      {'eos_token': '<eos>', 'chat_template': '{% if'},
      'chat_template cannot be read',
    ),
    ('tokenizer', {}, 'is no tokenizer'),
    (
      'tokenizer',
      {'version': '1.0', 'model': {'type': 'BPE', 'vocab': {'a': -1}}},
      'is no tokenizer',
    ),
    (
      'tokenizer',
      {'version': '1.0', 'added_tokens': [], 'model': {'type': 'BPE', 'vocab': {}, 'merges': []}},
      'its vocabulary is empty',
    ),
  ],
)
def test_a_malformed_file_is_refused_by_name_and_key(folder, name, content, message):
  (folder / f'{name}.json').write_text(json.dumps(content))
  if message is None:  # an empty object names no token
    tokenizers.huggingface(path=str(folder))
    return
  with pytest.raises(ValueError, match=rf'{name}\.json.*{message}'):
    tokenizers.huggingface(path=str(folder))


@pytest.mark.parametrize('name', ['tokenizer', 'tokenizer_config', 'generation_config'])
@pytest.mark.parametrize('text', [b'', b'{', b'\xff\xfe', b'[' * 50_000])
def test_a_file_that_is_no_json_is_refused_by_name(folder, name, text):
  (folder / f'{name}.json').write_bytes(text)
  with pytest.raises(ValueError, match=rf'{name}\.json is no '):
    tokenizers.huggingface(path=str(folder))


def test_a_template_that_is_no_text_is_refused_by_name(folder):
  (folder / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(ValueError, match=r'chat_template\.jinja is no text'):
    tokenizers.huggingface(path=str(folder))


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('added_tokens', {'<a>': -1}, '<a> must be at least 0'),
    ('added_tokens', {'<a>': 2**40}, '<a> must be at least 0 and below'),
    ('added_tokens', {'<a>': 2}, "'<a>' has the id 2 of '</s>'"),
    ('tokenizer_config', {'added_tokens_decoder': []}, 'added_tokens_decoder must be an object'),
    ('tokenizer_config', {'added_tokens_decoder': {'x': {'content': 'a'}}}, "below .* got 'x'"),
    ('tokenizer_config', {'added_tokens_decoder': {'5': 'a'}}, '5 must be an object'),
    ('tokenizer_config', {'added_tokens_decoder': {'5': {}}}, '5 must be text, or an object'),
    ('tokenizer_config', {'add_bos_token': 'no'}, 'add_bos_token must be true or false'),
  ],
)
def test_malformed_tokens_beside_a_sentencepiece_model_are_refused(
  name, content, message, tmp_path
):
  folders.llama2(tmp_path)
  (tmp_path / f'{name}.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match=rf'{name}\.json.*{message}'):
    tokenizers.huggingface(path=str(tmp_path))


@pytest.mark.parametrize('make', [tokenizers.huggingface, tokenizers.sentencepiece])
@pytest.mark.parametrize('data', [b'', b'no model', bytes(200), b'\x0a' * 200])
def test_a_malformed_sentencepiece_model_is_refused_by_name(make, data, tmp_path):
  file = tmp_path / 'tokenizer.model'
  file.write_bytes(data)
  with pytest.raises(ValueError, match=r'tokenizer\.model'):
    make(path=str(file if make is tokenizers.sentencepiece else tmp_path))


@pytest.mark.parametrize('make', [tokenizers.huggingface, tokenizers.sentencepiece])
def test_a_missing_file_is_named(tmp_path, make):
  with pytest.raises(FileNotFoundError, match=r'nowhere.*: expected a'):
    make(path=str(tmp_path / 'nowhere'))


def test_table_entries_bind(folder, sentences):
  knobs = {
    'byte': {},
    'characters': {'alphabet': 'ab'},
    'sentencepiece': {'path': str(sentences)},
    'huggingface': {'path': str(folder)},
  }
  assert {f'tokenizers.{name}' for name in knobs} == tokenizers.TABLE.keys()
  for fn in tokenizers.TABLE.values():
    t = bind(json.loads(part(fn, **knobs[fn.__name__]).to_json()), tokenizers.TABLE)
    assert max(t.encode('ab')) < t.vocab_size


def test_smollm2_speaks_chatml_and_pads_with_its_stop_token(smollm2):
  t = tokenizers.huggingface(path=smollm2)
  system = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
  assert t.chat(HELLO) == (
    f'<|im_start|>system\n{system}<|im_end|>\n'
    '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n'
  )
  config = json.loads((pathlib.Path(smollm2) / 'config.json').read_text())
  assert t.vocab_size == config['vocab_size'] == 49152
  assert (t.pad_id, t.bos_id, t.stop_ids) == (2, -1, (2,))
  for text in TEXTS:
    assert t.decode(t.encode(text)) == text
