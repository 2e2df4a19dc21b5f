"""The shell: chats with commands, interrupted answers, and models that can read no more."""

import io
import signal

import pytest
from absl import flags
from absl.testing import flagsaver

from polgrad import build, evaluate, loading, sample
from polgrad.collect import completions
from polgrad.data import batching
from polgrad.sampling import behavior_policies, make_sampler
from polgrad.sharding import to_host
from tests import hub
from tests.data import folders

flags.FLAGS.mark_as_parsed()


class Parrot:
  """Answers with the words of the last message; `seen` has all conversations."""

  limit, cut = 100, False

  def __init__(self):
    self.seen = []

  def __call__(self, record, turn):
    self.seen.append([m['content'] for m in record['messages']])
    words = record['messages'][-1]['content']
    if words == 'long':
      raise batching.TooLong
    self.cut = words == 'cut'
    for letter in words:
      if letter == '!':
        signal.raise_signal(signal.SIGINT)
      yield letter


def talk(capsys, lines, **settings):
  parrot = Parrot()
  sample.chat(parrot, [line + '\n' for line in lines], **settings)
  told = capsys.readouterr()
  return parrot.seen, told.out.splitlines(), told.err.splitlines()


def test_a_chat_knows_its_turns_until_it_is_reset(capsys):
  seen, out, err = talk(capsys, ['a', 'b', '', '/reset', 'c', '/quit', 'd'], system='s')
  assert seen == [['s', 'a'], ['s', 'a', 'a', 'b'], ['s', 'c']]
  assert out == ['a', 'b', 'c'] and err == ['[a new conversation]']


def test_commands_are_listed_and_unknown_ones_are_not_sent(capsys):
  seen, _, err = talk(capsys, ['/help', '/halp', '/etc/hosts is?'])
  assert seen == [['/etc/hosts is?']]
  assert err[0] == f'[{sample.COMMANDS}]' and err[1].startswith('[there is no /halp: /reset')


def test_a_conversation_that_is_too_long_says_what_to_do_and_continues(capsys):
  seen, out, err = talk(capsys, ['long', 'a', 'cut'])
  assert err == [
    '[the conversation is full: the model reads 100 tokens; use /reset]',
    '[the answer is cut; --max_new_tokens allows longer ones]',
  ]
  assert seen[1] == ['a'] and out == ['a', 'cut']


def test_ctrl_c_ends_an_answer_and_not_the_chat(capsys):
  before = signal.getsignal(signal.SIGINT)
  seen, out, err = talk(capsys, ['one!two', 'b'])
  assert out == ['one!', 'b'] and err == ['[interrupted]']
  assert seen[1] == ['one!two', 'one!', 'b']  # what was said stays in the conversation
  assert signal.getsignal(signal.SIGINT) == before


def test_an_answer_is_revised_by_a_prompt_that_shows_it(capsys):
  seen, out, _ = talk(capsys, ['a', 'b'], revise=2, request='r')
  assert out == ['a', 'r', 'r', 'b', 'r', 'r']
  assert seen[:3] == [['a'], ['a', 'a', 'r'], ['a', 'r', 'r']]
  assert seen[3:] == [['a', 'r', 'b'], ['a', 'r', 'b', 'b', 'r'], ['a', 'r', 'b', 'r', 'r']]


def test_a_second_ctrl_c_ends_the_program():
  def slow():  # a piece that takes long, such as a compilation
    signal.raise_signal(signal.SIGINT)
    yield signal.raise_signal(signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    sample.show(slow())


def test_lines_are_typed_until_ctrl_d(capsys):
  typed = iter(['a', KeyboardInterrupt, 'b', EOFError])

  def read(prompt):
    line = next(typed)
    if isinstance(line, str):
      return line
    raise line

  assert list(sample.typed_lines(read)) == ['a', 'b']
  assert sample.COMMANDS in capsys.readouterr().err


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return hub.small('qwen3', tmp_path_factory.mktemp('hub'))


def unstreamed(folder, **settings):
  """The function from messages and turn to the completion of the sampler of training."""
  config = loading.bare(folder)
  config.mesh.data = 1
  experiment = build.build(config)
  params = evaluate.init_params(experiment.policy, experiment.mesh, 0)
  tokenizer = experiment.tokenizer
  sampler = make_sampler(
    {'policy': experiment.policy},
    behavior_policy=behavior_policies.current,
    mesh=experiment.mesh,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
    **settings,
  )

  def complete(messages, turn):
    records = [{'messages': messages, 'id': turn}]
    prompts = batching.prompts(records, tokenizer, length=200)
    rows = (prompts.tokens, prompts.mask, prompts.ids)
    made = sampler({'policy': params}, *rows, seed=3, step=turn)  # the seed of the chat
    return completions(to_host(made), records, tokenizer)[0]

  return complete


def test_a_chat_in_a_pipe_says_what_the_sampler_says(folder, monkeypatch, capfd):
  monkeypatch.setattr('sys.stdin', io.StringIO('hello world\nwho are you?\n'))
  asked = dict(temperature=1.0, top_p=0.9, max_new_tokens=12, seed=3)
  with flagsaver.flagsaver(model=folder, chat=True, compilation_cache='', **asked):
    sample.main(['sample'])
  told = capfd.readouterr()
  assert told.err.startswith('[compiling for conversations of up to 256 tokens ...]')
  del asked['seed']
  first = [{'role': 'user', 'content': 'hello world'}]
  complete = unstreamed(folder, **asked)
  reply = complete(first, 0)
  second = [{'role': 'assistant', 'content': reply}, {'role': 'user', 'content': 'who are you?'}]
  assert told.out == f'{reply}\n{complete(first + second, 1)}\n'


def test_a_chat_without_a_template_is_refused_in_one_line(folder, tmp_path, capsys):
  experiment = loading.bare(hub.small('qwen3', tmp_path))
  folders.write(tmp_path / 'qwen3', 'tokenizer_config.json', eos_token='<|im_end|>')
  given = dict(model=experiment.model.path, chat=True, compilation_cache='')
  with flagsaver.flagsaver(**given), pytest.raises(SystemExit) as ended:
    sample.main(['sample'])
  told = capsys.readouterr().err
  assert ended.value.code == 2 and 'no chat template' in told and told.count('\n') == 1


@pytest.mark.parametrize(
  'given, named',
  [
    (dict(strength=4.0), '--scorer'),
    (dict(candidates=4), '--scorer'),
    (dict(candidates=4, scorer='policy', strength=2.0), '--strength'),
    (dict(block_tokens=4, scorer='policy'), '--candidates'),
  ],
)
def test_steering_that_has_no_effect_is_refused_in_one_line(given, named, folder, capsys):
  flags = flagsaver.flagsaver(model=folder, compilation_cache='', **given)
  with flags, pytest.raises(SystemExit) as ended:
    sample.main(['sample'])
  told = capsys.readouterr().err
  assert ended.value.code == 2 and named in told and told.count('\n') == 1


def test_the_best_of_several_answers_is_printed(folder, capfd):
  given = dict(scorer=folder, candidates=3, block_tokens=8, max_new_tokens=8, temperature=1.0)
  with flagsaver.flagsaver(model=folder, prompt=['hello'], compilation_cache='', **given):
    sample.main(['sample'])
  told = capfd.readouterr()
  assert told.err == '' and told.out.endswith('\n') and len(told.out) > 1
