"""Observations are the tokens that a chat template writes between two turns."""

import pytest
import tokenizers as hf

from polgrad.data import tokenizers
from polgrad.environments import Guess, Tools, conversation, toolbox
from polgrad.environments.episodes import Episodes, failures
from polgrad.environments.workers import Pool
from tests.data import folders
from tests.environments import templates

ASKED = [{'role': 'user', 'content': 'How old?'}]
TOOLS = Tools(tools={'calculate': toolbox.calculate})
RESULTS = TOOLS.step(0, '{"name": "calculate", "parameters": {"expression": "6*7"}}').observation
FAMILIES = {
  'chatml': (folders.CHATML, 'tool', '\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n'),
  'qwen3': (
    templates.QWEN3,
    'tool',
    '\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
  ),
  'hermes': (
    templates.HERMES,
    'tool',
    '\n<|im_start|>tool\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
  ),
  'llama31': (
    templates.LLAMA31,
    'tool',
    '<|im_start|>ipython<|im_start|>\n\n"42"<|im_end|><|im_start|>assistant<|im_start|>\n\n',
  ),
  'mistral': (templates.MISTRAL, 'tool', '[TOOL_RESULTS] 42call00000[/TOOL_RESULTS]'),
}


@pytest.fixture(scope='module')
def tokenizer_of(tmp_path_factory):
  """Makes the tokenizer of a template, once for each."""
  made = {}

  def make(template):
    if template not in made:
      folder = folders.chatml(tmp_path_factory.mktemp('folder'), template)
      made[template] = tokenizers.huggingface(path=str(folder)), read_by(folder)
    return made[template]

  return make


def read_by(folder):
  model = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  return lambda ids: model.decode(ids, False)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_results_of_tools_follow_a_turn_as_the_template_writes_them(tokenizer_of, family):
  template, _, text = FAMILIES[family]
  t, read = tokenizer_of(template)
  # Its words tell a template with tools from one without.
  record = {'id': 0, 'messages': ASKED} if family == 'chatml' else TOOLS.opened({'messages': ASKED})
  between = lambda stopped: conversation.between(RESULTS, record, t, stopped=stopped).ids
  assert read(between(True)) == text
  assert read(between(False)) == '<|im_end|>' + text
  # Prompt, turn and results are the conversation that the template writes, if it changes no turn.
  said = {'role': 'assistant', 'content': 'I see.'}
  whole = t.chat([*ASKED, said, *RESULTS], tools=record.get('tools'))
  before = whole[: whole.rindex('I see.') + len('I see.')]
  assert before + '<|im_end|>' + text == whole


def test_a_template_that_drops_thoughts_of_earlier_turns_does_not_matter(tokenizer_of):
  t, read = tokenizer_of(templates.QWEN3)
  talk = [*ASKED, {'role': 'assistant', 'content': '<think>so</think>yes'}]
  assert 'so' not in t.chat([*talk, *ASKED])
  record = {'id': 0, 'messages': ASKED}
  episodes = Episodes(Pool(Guess()), t, [record], samples_per_prompt=1, seeds=[0])
  drawn = t.encode('<think>so</think>yes 3<|im_end|>')
  episodes.ask(0, drawn, True)
  ((_, ids),) = episodes.take(wait=True)
  assert read(ids).startswith('\n<|im_start|>user\n')  # and what was drawn stays in the row
  assert episodes.episodes[0].turns == ['<think>so</think>yes 3']


def test_what_the_generation_prompt_writes_of_each_turn_is_seen_by_the_environment(tokenizer_of):
  t, read = tokenizer_of(templates.THINKING)
  record = {'id': 0, 'messages': ASKED, 'answer': '12'}
  t = t.sampling('I ', ())
  episodes = Episodes(Pool(Guess()), t, [record], samples_per_prompt=1, seeds=[0])
  for said in ('guess</think>1', '</think>2'):
    episodes.ask(0, t.encode(said), False)
    ((_, ids),) = episodes.take(wait=True)
    assert read(ids).endswith('<|im_start|>assistant\n<think>\n')
  # The prefix belongs to the prompt, so to the first turn alone.
  assert episodes.episodes[0].turns == ['<think>\nI guess</think>1', '<think>\n</think>2']


def test_tokens_that_were_begun_are_decoded_with_the_first_turn():
  t = tokenizers.byte()
  record = {'id': 0, 'prompt': 'a', 'begun': list('é'.encode())[:1]}
  episodes = Episodes(Pool(Guess()), t, [record], samples_per_prompt=1, seeds=[0])
  episodes.ask(0, list('é'.encode())[1:], False)
  assert episodes.episodes[0].turns == ['é']


@pytest.mark.parametrize('family', ['gemma', 'llama3', 'llama2'])
def test_other_tokenizers_write_what_they_would_read(tmp_path, family):
  t = tokenizers.huggingface(path=str(getattr(folders, family)(tmp_path)))
  record = {'id': 0, 'messages': ASKED}
  whole = t.encode(t.chat([*ASKED, {'role': 'assistant', 'content': 'yes'}, *ASKED]))
  for stopped in (False, True):
    read = conversation.between('How old?', record, t, stopped=stopped).ids
    tail = [t.stop_ids[0], *read] if stopped else read
    assert whole[-len(tail) :] == tail and len(tail) > 8


def test_smollm2_reads_an_observation_as_a_user_turn(smollm2):
  t = tokenizers.huggingface(path=smollm2)
  record = {'id': 0, 'messages': ASKED}
  read = conversation.between('Why?', record, t, stopped=True)
  text = '\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'
  assert (read.ids, read.text) == (t.encode(text), 'Why?')


def test_plain_prompts_read_an_observation_word_for_word():
  for t in (tokenizers.byte(), tokenizers.characters(alphabet='0123456789<>=+')):
    record = {'id': 0, 'prompt': '1+1='}
    assert conversation.between('42>', record, t, stopped=True).ids == t.encode('42>')
  t = tokenizers.byte()
  read = conversation.between('42', {'id': 0, 'messages': ASKED}, t, stopped=True).ids
  assert bytes(read).decode() == '\nuser: 42\nassistant: '


@pytest.mark.parametrize(
  ('template', 'environment', 'why'),
  [
    (templates.FORGETFUL, Guess(), "Guess: .* role 'user': the text after a turn is not known"),
    (templates.DEAF, TOOLS, "role 'tool', of which the chat template writes nothing"),
    (folders.CHATML, TOOLS, "Tools: .* role 'tool': the record has tools"),
  ],
)
def test_a_template_that_cannot_write_observations_is_refused(
  tokenizer_of, template, environment, why
):
  t, _ = tokenizer_of(template)
  record = environment.opened({'id': 0, 'messages': ASKED})
  with pytest.raises(ValueError, match=why):
    conversation.check(environment, record, t)


def test_templates_that_can_are_not_refused(tokenizer_of):
  able = (templates.QWEN3, templates.HERMES, templates.LLAMA31, templates.THINKING)
  for template in (*able, templates.MISTRAL):
    t, _ = tokenizer_of(template)
    for environment in (Guess(), TOOLS):
      conversation.check(environment, environment.opened({'messages': ASKED}), t)
  conversation.check(Guess(), {'prompt': 'a'}, tokenizers.byte())


def test_a_long_observation_is_cut_before_the_template_is_applied(tokenizer_of):
  t, read = tokenizer_of(folders.CHATML)
  record = {'id': 0, 'messages': ASKED}
  for size in (3, 10, 50):
    found = conversation.between('well how are you ' * 5000, record, t, stopped=True, limit=size)
    assert found.cut and len(t.encode(found.text)) <= size
    assert found.text.endswith('[...]') == (size > 3)
    assert read(found.ids).endswith(found.text + '<|im_end|>\n<|im_start|>assistant\n')
  exact = 'well how are you'
  size = len(t.encode(exact))
  assert not conversation.between(exact, record, t, stopped=True, limit=size).cut
  assert conversation.between(exact, record, t, stopped=True, limit=size - 1).cut
  digits = tokenizers.characters(alphabet='0123456789')
  assert conversation.shortened('123456', digits, 4) == ('1234', True)


def test_a_cut_is_counted_and_a_message_that_cannot_be_written_fails_its_row():
  class Speaks(Guess):
    def step(self, state, text):
      return super().step(state, '')._replace(observation=text)

  t = tokenizers.characters(alphabet='0123456789')
  records = [{'id': 0, 'prompt': '1'}]
  made = Episodes(
    Pool(Speaks()), t, records, samples_per_prompt=3, seeds=range(3), observation_tokens=2
  )
  made.ask(0, t.encode('12'), True)
  made.ask(1, t.encode('123'), True)
  made.ask(2, [], True)
  assert dict(made.take(wait=True)) == {0: t.encode('12'), 1: t.encode('12'), 2: None}
  cuts = [episode.metrics[0]['observation_cut'] for episode in made.episodes[:2]]
  assert cuts == [0.0, 1.0]
  errors, messages = failures(made.episodes)
  assert errors == {'environment/Unreadable': 1}
  assert 'row 2: environment, turn 1: Unreadable: ' in messages[0]
