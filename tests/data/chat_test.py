"""Conversations: exactly the assistant's turns are trained, after exactly the sampler's prompts."""

import itertools
import json

import jinja2
import pytest
import sentencepiece as spm
import tokenizers as hf

from polgrad.data import batching, chat, tokenizers
from tests.data import folders

TALK = [
  {'role': 'user', 'content': 'hi <there>'},
  {'role': 'assistant', 'content': 'Hello, 👩!'},
  {'role': 'user', 'content': 'assistant: Hello'},
  {'role': 'assistant', 'content': 'naïve\ncafé'},
]
ENDS = {
  'chatml': '<|im_end|>',
  'llama3': '<|eot_id|>',
  'gemma': '<end_of_turn>',
}


def with_system(messages):
  return [{'role': 'system', 'content': 'be brief'}, *messages]


def trained(tokenizer, messages):
  """[ids] of each run of trained tokens."""
  ids, mask = tokenizer.conversation(messages)
  runs = itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])
  return [[i for i, _ in run] for on, run in runs if on]


def read(folder, ids):
  """Text, special tokens included."""
  return hf.Tokenizer.from_file(str(folder / 'tokenizer.json')).decode(ids, False)


def sampled_prompt(tokenizer, messages):
  got = batching.prompts([{'messages': messages, 'id': 0}], tokenizer, length=300)
  return got.tokens[0, got.mask[0]].tolist()


@pytest.mark.parametrize('family', ENDS)
def test_every_assistant_turn_is_trained_through_its_end_and_nothing_else(tmp_path, family):
  folder = getattr(folders, family)(tmp_path)
  t = tokenizers.huggingface(path=str(folder))
  for talk in (TALK, with_system(TALK), with_system(TALK)[:3]):
    turns = [m['content'] + ENDS[family] for m in talk if m['role'] == 'assistant']
    assert [read(folder, run) for run in trained(t, talk)] == turns


@pytest.mark.parametrize('legacy', [False, True])
def test_turns_of_a_sentencepiece_model_alone_are_trained_through_eos(tmp_path, legacy):
  t = tokenizers.huggingface(path=str(folders.llama2(tmp_path, legacy=legacy)))
  runs = trained(t, TALK)
  assert [t.decode(run).strip() for run in runs] == ['Hello, 👩!', 'naïve\ncafé']
  assert all(run[-1] == t.stop_ids[0] and run.count(t.stop_ids[0]) == 1 for run in runs)


@pytest.mark.parametrize('family', [*ENDS, 'llama2'])
def test_the_prompt_of_the_sampler_comes_before_the_last_turn(tmp_path, family):
  t = tokenizers.huggingface(path=str(getattr(folders, family)(tmp_path)))
  for talk in (TALK[:2], TALK):
    prompt = sampled_prompt(t, talk[:-1])
    ids, mask = t.conversation(talk)
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]


def test_no_token_reaches_from_the_prompt_into_the_last_turn(tmp_path):
  # The prompt ends with a newline, the words begin with more: together they would be one token.
  folder = folders.chatml(tmp_path)
  t = tokenizers.huggingface(path=str(folder))
  talk = [TALK[0], {'role': 'assistant', 'content': '\n\nyes'}]
  prompt = sampled_prompt(t, talk[:-1])
  whole = t.encode(t.chat(talk, add_generation_prompt=False))
  assert whole[: len(prompt)] != prompt
  ids, mask = t.conversation(talk)
  assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
  assert read(folder, ids[len(prompt) :]) == '\n\nyes<|im_end|>'


def test_a_row_is_that_of_prompt_and_answer_when_there_is_one_turn(tmp_path):
  for name, t in {
    'byte': tokenizers.byte(),
    'chatml': tokenizers.huggingface(path=str(folders.chatml(tmp_path))),
  }.items():
    spoken = {'messages': TALK[:2], 'id': 0}
    asked = {'messages': TALK[:1], 'answer': TALK[1]['content'], 'id': 0}
    ours, theirs = (batching.supervised([r], t, length=120) for r in (spoken, asked))
    assert ours.tokens.tolist() == theirs.tokens.tolist(), name
    assert ours.mask.tolist() == theirs.mask.tolist(), name


def test_plain_lines_train_the_words_and_end_the_last_turn():
  t = tokenizers.byte()
  ids, _ = t.conversation(TALK)
  assert bytes(ids[:-1]).decode() == t.chat(TALK, add_generation_prompt=False).rstrip('\n')
  words = ['Hello, 👩!', 'naïve\ncafé']
  assert [t.decode(run) for run in trained(t, TALK)] == words
  assert ids[-1] == t.stop_ids[0] and ids.count(t.stop_ids[0]) == 1


def test_an_empty_last_turn_trains_its_stop_token():
  t = tokenizers.characters(alphabet='useraitn: \n01')
  talk = [
    {'role': 'user', 'content': '0'},
    {'role': 'assistant', 'content': '1'},
    {'role': 'user', 'content': '1'},
    {'role': 'assistant', 'content': ''},
  ]
  assert trained(t, talk) == [t.encode('1'), [t.stop_ids[0]]]


def test_words_that_a_token_joins_to_the_space_before_them_are_trained(tmp_path):
  folders.llama2(tmp_path)
  path = str(tmp_path / 'tokenizer.model')
  t = tokenizers.sentencepiece(path=path)
  talk = [{**m, 'content': m['content'].replace('Hello', 'hello')} for m in TALK]
  ids = t.encode(t.chat(talk, add_generation_prompt=False))
  assert '▁hello' in spm.SentencePieceProcessor(model_file=path).id_to_piece(ids)
  first, last = trained(t, talk)
  assert (t.decode(first), t.decode(last)) == ('hello, 👩!', 'naïve\ncafé')


def test_the_space_before_an_earlier_turn_is_not_trained(tmp_path):
  template = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  folder = folders.chatml(tmp_path, template)
  t = tokenizers.huggingface(path=str(folder))
  talk = [TALK[0], {'role': 'assistant', 'content': '👩'}, *TALK[2:]]
  assert read(folder, trained(t, talk)[0]) == '👩<|im_end|>'


def test_a_turn_without_a_stop_token_ends_before_the_next_even_if_that_says_the_same(tmp_path):
  template = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  folder = folders.chatml(tmp_path, template)
  t = tokenizers.huggingface(path=str(folder))
  runs = trained(t, [*TALK[:3], TALK[1]])
  assert [read(folder, run).strip() for run in runs] == ['Hello, 👩!', 'Hello, 👩!<|im_end|>']


@pytest.mark.parametrize(
  'block',
  [
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
    "{%- generation -%}\n{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
  ],
)
def test_marks_of_the_template_reach_through_the_stop_token_and_no_further(tmp_path, block):
  template = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + block
    + "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
  )
  folder = folders.chatml(tmp_path, template)
  t = tokenizers.huggingface(path=str(folder))
  turns = ['Hello, 👩!<|im_end|>', 'naïve\ncafé<|im_end|>']
  assert [read(folder, run) for run in trained(t, TALK)] == turns


def test_marks_may_leave_thoughts_of_a_turn_out(tmp_path):
  template = folders.MARKED.replace('{% generation %}', "{{ '<think></think>' }}{% generation %}")
  folder = folders.chatml(tmp_path, template)
  runs = trained(tokenizers.huggingface(path=str(folder)), TALK)
  assert [read(folder, run) for run in runs] == ['Hello, 👩!<|im_end|>', 'naïve\ncafé<|im_end|>']


def test_marks_that_miss_the_last_turn_are_an_error(tmp_path):
  template = folders.MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.first")
  t = tokenizers.huggingface(path=str(folders.chatml(tmp_path, template)))
  with pytest.raises(ValueError, match='marks nothing of the last turn'):
    t.conversation(TALK)


def test_a_template_that_writes_thoughts_into_the_last_turn_trains_them_there(tmp_path):
  folder = folders.chatml(tmp_path, folders.THOUGHTS)
  runs = trained(tokenizers.huggingface(path=str(folder)), TALK)
  assert [read(folder, run) for run in runs] == [
    'Hello, 👩!<|im_end|>',
    '<think>\n\n</think>\n\nnaïve\ncafé<|im_end|>',
  ]


def test_thoughts_that_the_template_strips_from_an_earlier_turn_are_an_error(tmp_path):
  t = tokenizers.huggingface(path=str(folders.chatml(tmp_path, folders.THOUGHTS)))
  thought = {'role': 'assistant', 'content': '<think>so</think>yes'}
  kept = trained(t, [TALK[0], thought])
  assert 'so' in t.decode(kept[0])
  record = {'messages': [TALK[0], thought, *TALK[2:]], 'id': 7}
  with pytest.raises(ValueError, match=r'record 7: message 1: .* not write the content as it is'):
    batching.supervised([record], t, length=300)


def test_a_prompt_that_opens_a_thought_which_the_turn_lacks_is_an_error(tmp_path):
  opened = "{{ '<|im_start|>assistant\n<think>\n' }}"
  template = folders.CHATML.replace("{{ '<|im_start|>assistant\n' }}", opened)
  t = tokenizers.huggingface(path=str(folders.chatml(tmp_path, template)))
  with pytest.raises(ValueError, match='message 3: the prompt for this turn'):
    t.conversation(TALK)


def test_calls_of_tools_are_trained_and_their_results_are_not(tmp_path):
  template = folders.CHATML.replace(
    'm.content', "(m.content or '') + ((m.tool_calls | tojson) if m.tool_calls else '')"
  )
  folder = folders.chatml(tmp_path, template)
  call = {'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'add'}]}
  talk = [TALK[0], call, {'role': 'tool', 'content': 'found 3'}, TALK[3]]
  runs = trained(tokenizers.huggingface(path=str(folder)), talk)
  assert [read(folder, run) for run in runs] == [
    '[{"name": "add"}]<|im_end|>',
    'naïve\ncafé<|im_end|>',
  ]


@pytest.mark.parametrize(
  ('messages', 'why'),
  [
    (TALK[:3], 'ends with an assistant turn'),
    (TALK[1:], 'cannot begin with the assistant'),
    ([TALK[0], {'role': 'assistant', 'content': 'a<|im_end|>b'}], 'message 1: .*as it is before'),
    ([TALK[0], {'role': 'assistant', 'content': [{'text': 'a'}]}], 'content must be text|fails'),
  ],
)
def test_a_conversation_that_cannot_be_trained_says_why(tmp_path, messages, why):
  t = tokenizers.huggingface(path=str(folders.chatml(tmp_path)))
  with pytest.raises(ValueError, match=why):
    t.conversation(messages)


def test_an_end_of_turn_that_is_no_stop_token_is_named(tmp_path):
  folder = folders.chatml(tmp_path, folders.CHATML.replace('<|im_end|>', '###'))
  t = tokenizers.huggingface(path=str(folder))
  with pytest.raises(ValueError, match=r"message 3: .* '###', which is none of the stop"):
    t.conversation(TALK)


def test_a_stop_token_takes_in_the_newline_that_it_is_declared_to_take_in(tmp_path):
  folder = folders.chatml(tmp_path)
  saved = json.loads((folder / 'tokenizer.json').read_text())
  for token in saved['added_tokens']:
    token['rstrip'] = token['content'] == '<|im_end|>'
  (folder / 'tokenizer.json').write_text(json.dumps(saved))
  turns = ['Hello, 👩!<|im_end|>', 'naïve\ncafé<|im_end|>']
  runs = trained(tokenizers.huggingface(path=str(folder)), TALK)
  assert [read(folder, run) for run in runs] == turns


def test_plain_chat_with_the_reply_continues_the_generation_prompt():
  asked = chat.plain_chat(TALK[:1])
  assert asked == 'user: hi <there>\nassistant: '
  assert chat.plain_chat(TALK[:2], add_generation_prompt=False) == asked + 'Hello, 👩!\n'


@pytest.mark.parametrize(
  'source',
  [
    '{% for i in range(10**9) %}{% endfor %}',
    '{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}',
    "{% set x = ('a' * 19000) | list %}{% for i in x %}{% for j in x %}{% endfor %}{% endfor %}",
    "{% set x = 'a' * 19000 %}{% for i in x | map('upper') %}{% for j in x %}{% endfor %}{% endfor %}",
    '{% for i in range(10**6) %}' + 'x' * 1000 + '{% endfor %}',
    "{{ 'a' * 10**9 }}",
    '{% set a = [0] * 10**9 %}',
    '{{ 9**9**9 }}',
    '{{ 1 // 0 }}',
    '{{ [][5] + 1 }}',
    "{{ ''.__class__.__mro__ }}",
    '{{ messages.append(1) }}',
  ],
)
def test_a_template_that_grows_without_end_or_leaves_its_sandbox_is_refused(source):
  with pytest.raises(ValueError, match='the chat template fails'):
    chat.jinja_chat(source, {})([{'role': 'user', 'content': 'hi'}])


def turn_of(folder, record, length=150, **options):
  """What is trained of a record, with special tokens."""
  t = tokenizers.huggingface(path=str(folder), **options)
  row = batching.supervised([{**record, 'id': 0}], t, length=length)
  return read(folder, row.tokens[0, row.mask[0]].tolist())


OPENED = "{{ '<|im_start|>assistant\n<think>\n' }}"


def opened(template):
  return template.replace("{{ '<|im_start|>assistant\n' }}", OPENED)


@pytest.mark.parametrize('field', ['answer', 'chosen'])
def test_an_empty_block_of_thoughts_is_trained_alike_in_every_form_of_a_record(tmp_path, field):
  folder = folders.chatml(tmp_path, folders.THOUGHTS)
  t = tokenizers.huggingface(path=str(folder))
  spoken = {'messages': TALK, 'id': 0}
  want = '<think>\n\n</think>\n\nnaïve\ncafé<|im_end|>'
  ids, mask = t.conversation(TALK, only_last=True)
  assert read(folder, [i for i, on in zip(ids, mask) if on]) == want
  asked = {'messages': TALK[:3], field: TALK[3]['content'], 'rejected': 'no', 'id': 0}
  make = batching.supervised if field == 'answer' else batching.pairs
  row, whole = make([asked], t, length=150), batching.supervised([spoken], t, length=150)
  assert row.tokens[0].tolist() == whole.tokens[0].tolist()
  assert read(folder, row.tokens[0, row.mask[0]].tolist()) == want


def test_a_block_of_thoughts_that_the_prompt_writes_is_not_trained(tmp_path):
  block = "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
  template = folders.THOUGHTS.replace("{{ '<|im_start|>assistant\n' }}", block)
  folder = folders.chatml(tmp_path, template)
  for record in ({'messages': TALK[:2]}, {'messages': TALK[:1], 'answer': 'Hello, 👩!'}):
    assert turn_of(folder, record) == 'Hello, 👩!<|im_end|>'


# As Qwen 3 does, closes the thoughts at once if they are not wanted.
SWITCHED = folders.THOUGHTS.replace(
  "{{ '<|im_start|>assistant\n' }}",
  "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
  "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)


@pytest.mark.parametrize(
  ('options', 'opening', 'trained'),
  [
    ({}, '', '<think>\n\n</think>\n\nHello, 👩!<|im_end|>'),
    ({'enable_thinking': True}, '', '<think>\n\n</think>\n\nHello, 👩!<|im_end|>'),
    ({'enable_thinking': False}, '<think>\n\n</think>\n\n', 'Hello, 👩!<|im_end|>'),
  ],
)
def test_an_option_of_the_template_decides_whether_the_block_of_thoughts_is_trained(
  tmp_path, options, opening, trained
):
  folder = folders.chatml(tmp_path, SWITCHED)
  made = tokenizers.huggingface(path=str(folder), template_options=options)
  assert made.opening == opening
  for record in ({'messages': TALK[:2]}, {'messages': TALK[:1], 'answer': 'Hello, 👩!'}):
    assert turn_of(folder, record, template_options=options) == trained


@pytest.mark.parametrize('template', [folders.CHATML, folders.THOUGHTS])
def test_an_answer_may_begin_with_the_thoughts_that_the_prompt_opens_or_continue_them(
  tmp_path, template
):
  folder = folders.chatml(tmp_path, opened(template))
  whole = '<think>\nso\n</think>\n\nyes'
  for answer in (whole, whole.removeprefix('<think>\n')):
    got = turn_of(folder, {'messages': TALK[:1], 'answer': answer})
    assert got == 'so\n</think>\n\nyes<|im_end|>'
  spoken = [TALK[0], {'role': 'assistant', 'content': whole}]
  assert turn_of(folder, {'messages': spoken}) == 'so\n</think>\n\nyes<|im_end|>'


def test_earlier_turns_of_a_record_with_an_answer_are_not_trained_nor_refused(tmp_path):
  folder = folders.chatml(tmp_path, folders.THOUGHTS)
  thought = {'role': 'assistant', 'content': '<think>so</think>yes'}
  record = {'messages': [TALK[0], thought, TALK[2]], 'answer': 'no'}
  assert turn_of(folder, record) == '<think>\n\n</think>\n\nno<|im_end|>'


TOOLS = [{'type': 'function', 'function': {'name': 'add'}}]


def test_tools_of_a_record_reach_prompts_answers_pairs_and_conversations(tmp_path):
  template = '{% if tools %}{{ tools | tojson }}{% endif %}' + folders.CHATML
  t = tokenizers.huggingface(path=str(folders.chatml(tmp_path, template)))
  spoken = {'messages': TALK, 'id': 0}
  asked = {'messages': TALK[:3], 'answer': 'a', 'chosen': 'b', 'rejected': 'c', 'id': 0}
  for make, record in (
    (batching.prompts, asked),
    (batching.supervised, asked),
    (batching.supervised, spoken),
    (batching.pairs, asked),
  ):
    texts = [
      read(tmp_path, row) for row in make([{**record, 'tools': TOOLS}], t, length=250).tokens
    ]
    assert all(json.dumps(TOOLS) in text for text in texts)


def test_tools_that_nothing_reads_are_refused_with_their_record(tmp_path):
  t = tokenizers.huggingface(path=str(folders.chatml(tmp_path)))
  asked = {'messages': TALK[:1], 'answer': 'a', 'tools': TOOLS, 'id': 7}
  for make in (batching.prompts, batching.supervised):
    with pytest.raises(ValueError, match=r'record 7: .*template does not read them'):
      make([asked], t, length=250)
  with pytest.raises(ValueError, match=r'record 7: .*template does not read them'):
    batching.supervised([{'messages': TALK, 'tools': TOOLS, 'id': 7}], t, length=250)
  with pytest.raises(
    ValueError, match='record 7: a prompt that is text has no place for its tools'
  ):
    batching.prompts([{'prompt': 'a', 'tools': TOOLS, 'id': 7}], t, length=250)


DOUBLED = (
  '{% set kept = namespace(x="ab") %}{% for i in range(60) %}{% set kept.x = MADE %}{% endfor %}'
)


@pytest.mark.parametrize(
  'template',
  [
    "{{ 'a'.center(999999999) }}",
    "{{ 'a'|center(999999999) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d'|format(1) }}",
    '{{ messages|tojson(indent=999999999) }}',
    "{{ '{:999999999}'.format(1) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "{{ ('x\\n' * 99999)|indent(99999) }}",
    "{{ ('x\\n' * 99999)|indent('y' * 99999) }}",
    "{{ ('x' * 99999)|wordwrap(1, wrapstring='y' * 99999) }}",
    "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "{{ ('a' * 99999)|replace(old='a', new='b' * 99999) }}",
    "{{ (['a'] * 99999)|join('b' * 99999) }}",
    "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "{{ (['a' * 99999] * 99999)|join }}",
    "{{ range(99999)|map('string')|map('center', 99999)|list }}",
    "{{ range(99999)|map('string')|map('center', 99999)|join }}",
    DOUBLED.replace('MADE', 'kept.x ~ kept.x'),
    DOUBLED.replace('MADE', 'kept.x + kept.x'),
    DOUBLED.replace('MADE', "'%s%s' % (kept.x, kept.x)"),
    DOUBLED.replace('MADE', '[kept.x, kept.x]|join'),
  ],
)
def test_a_template_that_would_fill_the_memory_is_refused(template):
  with pytest.raises(ValueError, match='writes or counts more than'):
    chat.jinja_chat(template, {})(TALK)


@pytest.mark.parametrize('indent', ['999999', "'x' * 999999"])
def test_a_template_whose_json_would_fill_the_memory_is_refused(indent):
  with pytest.raises(ValueError, match='tojson indents by more than 100'):
    chat.jinja_chat('{{ messages|tojson(indent=INDENT) }}'.replace('INDENT', indent), {})(TALK)


def test_operators_filters_and_calls_that_are_limited_write_what_jinja_writes():
  template = (
    "{% for m in messages %}{{ m.role ~ ':' ~ 3 ~ m.content }}{{ '%s-%d' % ('a', 3) }}"
    "{{ 'b {}'.format(12) }}{{ m['content'].split(',')[0]|upper|indent(2) }}{{ 'x' + 'y' }}{% endfor %}"
    "{{ messages|map(attribute='role')|map('upper')|join(', ') }}{{ ', '.join(['a', 'b']) }}"
    "{{ 'a b'|replace('a', 'c')|wordwrap(2) }}{{ [3, 1]|map('string')|list|sort|join }}"
  )
  plain = jinja2.Environment().from_string(template).render(messages=TALK)
  assert chat.jinja_chat(template, {})(TALK) == plain


def test_options_of_a_template_are_what_it_reads_and_is_never_given():
  template = (
    '{%- if enable_thinking is defined and not enable_thinking %}{{ eos_token }}{% endif %}'
    '{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}'
    "{{ strftime_now('%d') }}{% set n = namespace(x=1) %}{{ range(n.x) }}"
  )
  assert chat.options_read(template) == {'enable_thinking'}
  assert chat.reads_date(template) and not chat.reads_date('{{ messages }}')
