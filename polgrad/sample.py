"""Prints completions of a model in the shell, word by word, or chats.

    python -m polgrad.sample --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m polgrad.sample ... --prompt='12+34='
    python -m polgrad.sample --model=FOLDER --chat --temperature=0.7 --top_p=0.95
    python -m polgrad.sample ... --params=teacher --scorer=policy --strength=4 --temperature=1
    python -m polgrad.sample ... --params=teacher --scorer=policy --candidates=4 --temperature=1
    python -m polgrad.sample ... --revise=2 --prompt='12+34='

The model is chosen as `polgrad.loading` says. Without --prompt, every line of the standard input is a
prompt. With --chat, every line is a user's turn, and the prompt is the conversation so far in the
tokenizer's chat template. /reset begins a new conversation, /help lists the commands, /quit or Ctrl-D
ends, and Ctrl-C interrupts an answer. With --revise, an answer and its revisions are one line each, and
the conversation continues with the last one. Answers are written to the standard output, all else to
stderr.
"""

import contextlib
import functools
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from absl import flags

from polgrad import cli, loading
from polgrad.build import Experiment
from polgrad.data import batching
from polgrad.sampling.blockwise import block_streamer
from polgrad.sampling.streaming import Streamer, Text
from polgrad.types import Params

_PROMPT = flags.DEFINE_multi_string(
  'prompt', [], 'Prompts to complete; repeat the flag for more. Default: read lines.'
)
_CHAT = flags.DEFINE_bool('chat', False, 'Read lines as turns of a conversation.')
_PREFIX = flags.DEFINE_string('prefix', '', 'Given beginning of every completion, such as <think>.')
_SYSTEM = flags.DEFINE_string('system', '', 'System turn of a chat.')
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, 'Sampling temperature; 0 is greedy.', lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'Draw from that number of most likely tokens; 0: from all.', lower_bound=0
)
_TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'Draw from the most likely tokens of this probability; 1: from all.',
  lower_bound=1e-6, upper_bound=1,
)  # fmt: skip
_SCORER = flags.DEFINE_string(
  'scorer',
  '',
  'What cd_fudge or cd_q trained, which steers the decoding: a folder, or "policy" of --workdir.',
)
_STRENGTH = flags.DEFINE_float('strength', 1.0, 'Strength of --scorer, in 1 / unit of its reward.')
_CANDIDATES = flags.DEFINE_integer(
  'candidates',
  0,
  'Draw that number of blocks of --block_tokens, continue with the one that --scorer values most, and '
  'repeat; 0: the scorer steers each token.',
  lower_bound=0,
)
_BLOCK = flags.DEFINE_integer('block_tokens', 8, 'Tokens of a block.', lower_bound=1)
_STOP = flags.DEFINE_multi_string(
  'stop', [], 'Text before which an answer ends; repeat the flag for more.'
)
_REVISE = flags.DEFINE_integer(
  'revise', 0, 'Ask that number of times for a better answer, as `srpo` trains it.', lower_bound=0
)
_REQUEST = flags.DEFINE_string(
  'request', '', 'What asks for a better answer: the `request` of the run of `srpo`, if it had one.'
)
_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 512, 'Maximum length of a completion.', lower_bound=1
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sampling noise.')

COMMANDS = '/reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C interrupts an answer'


class Completer:
  """Completes records with a `prompt` or `messages`, piece by piece.

  Attributes:
    limit: tokens that the model reads, those of the answer included.
    cut: whether the last completion ended without a stop token or stop string.
  """

  def __init__(
    self,
    experiment: Experiment,
    params: Params,
    *,
    max_new_tokens: int,
    seed: int = 0,
    prefix: str = '',
    stop: Sequence[str] = (),
    candidates: int = 0,
    block_tokens: int = 8,
    **settings,
  ):
    """Prepares a model.

    Args:
      params: of the experiment's policy.
      max_new_tokens: maximum length of a completion.
      seed: with the number of the turn, it seeds the sampling noise.
      prefix: given beginning of every completion.
      stop: texts before which a completion ends.
      candidates, block_tokens: with candidates, `block_streamer` draws in place of `Streamer`.
      settings: `temperature`, `top_k`, `top_p` and `scorer`; without candidates also `strength` and
        `note`, see `Streamer`.
    """
    self._tokenizer = experiment.tokenizer.sampling(prefix, ())
    self.limit = experiment.policy.config.max_length
    self._stop, self._length, self._seed = tuple(stop), max_new_tokens, seed
    make = Streamer
    if candidates:
      blocks = dict(candidates=candidates, block_tokens=block_tokens)
      make = functools.partial(block_streamer, **blocks)
    self._stream = make(experiment.policy, params, stop_ids=self._tokenizer.stop_ids, **settings)
    self.cut = False

  def __call__(self, record: dict, turn: int) -> Iterator[str]:
    """Yields pieces of the completion, some of them empty: one for each token.

    Raises:
      TooLong: the prompt leaves no room for an answer.
    """
    prompt = batching.prompts([{**record, 'id': turn}], self._tokenizer, length=self.limit - 1)
    ids = [int(i) for i in prompt.tokens[prompt.mask]]
    text, token = Text(self._tokenizer.decode, self._stop), None
    yield batching.opening(record, self._tokenizer)
    for token in self._stream(ids, max_new_tokens=self._length, seed=self._seed, turn=turn):
      if token not in self._tokenizer.stop_ids:
        yield text.add(token)
      if text.ended:
        break
    yield text.close()
    self.cut = token not in self._tokenizer.stop_ids and not text.ended


def answer(
  completer: Completer, record: dict, turn: int, revise: int = 0, request: str = ''
) -> str:
  """Prints the completion of a record, and then revisions of it.

  Args:
    record: with `prompt` or `messages`.
    turn: number of the record, for the sampling noise.
    revise: number of revisions; each sees the completion before it alone.
    request: what asks for a revision, see `batching.revision`.

  Returns:
    The last one.
  """
  turn *= 1 + revise  # every completion has a number, which seeds its noise
  text = show(completer(record, turn))
  for i in range(1, revise + 1):
    text = show(completer(batching.revision(record, text, request), turn + i))
  return text


def complete_lines(completer: Completer, lines: Iterable[str], **revisions) -> None:
  """Prints the completion of each line; `revisions` are arguments of `answer`."""
  for turn, line in enumerate(lines):
    answer(completer, {'prompt': line.rstrip('\n')}, turn, **revisions)


def chat(completer: Completer, lines: Iterable[str], system: str = '', **revisions) -> None:
  """Answers each line, knowing all lines and answers so far; `revisions` are arguments of `answer`."""
  first = [{'role': 'system', 'content': system}] if system else []
  messages, turn = list(first), 0
  for line in map(str.strip, lines):
    if line == '/quit':
      return
    if line == '/reset':
      messages = list(first)
      note('a new conversation')
    elif re.fullmatch(r'/\w+', line):
      note(COMMANDS if line == '/help' else f'there is no {line}: {COMMANDS}')
    elif line:
      asked = [*messages, {'role': 'user', 'content': line}]
      try:
        reply = answer(completer, {'messages': asked}, turn, **revisions)
      except batching.TooLong:
        note(f'the conversation is full: the model reads {completer.limit} tokens; use /reset')
        continue
      if completer.cut:
        note('the answer is cut; --max_new_tokens allows longer ones')
      messages = [*asked, {'role': 'assistant', 'content': reply}]
      turn += 1


def show(pieces: Iterator[str]) -> str:
  """Prints pieces of a text as they come, until Ctrl-C is pressed; returns the text."""
  text = ''
  with interruptible() as asked:
    for piece in pieces:
      print(piece, end='', flush=True)
      text += piece
      if asked:
        break
  print(flush=True)
  if asked:
    note('interrupted')
  return text


@contextlib.contextmanager
def interruptible() -> Iterator[list]:
  """Notes Ctrl-C in a list, instead of ending the program; a second one ends it."""
  asked = []

  def interrupt(number, frame):
    if asked:
      raise KeyboardInterrupt
    asked.append(number)

  before = signal.signal(signal.SIGINT, interrupt)
  try:
    yield asked
  finally:
    signal.signal(signal.SIGINT, before)


def answered(experiment: Experiment) -> bool:
  """Whether an environment answers the turns of the run."""
  settings = [experiment.evaluation, *(phase.collect for phase in experiment.phases.values())]
  return any(getattr(one, 'has_environment', False) for one in settings)


def note(text: str) -> None:
  """Tells something that is no answer."""
  print(f'[{text}]', file=sys.stderr, flush=True)


def typed_lines(read: Callable[[str], str] = input) -> Iterator[str]:
  """The lines that someone types, until Ctrl-D."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  lines can then be edited, and called back
  while True:
    try:
      line = read('> ')
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()
      note(COMMANDS)
      continue
    yield line


def main(argv: list[str]) -> None:
  loading.start(argv)
  with cli.refusals():
    if _STRENGTH.value != _STRENGTH.default and not _SCORER.value:
      raise ValueError('--strength is that of a scorer: add --scorer')
    if _CANDIDATES.value and not _SCORER.value:
      raise ValueError('--candidates are compared by a scorer: add --scorer')
    if _REQUEST.value and not _REVISE.value:
      raise ValueError('--request asks for better answers: add --revise')
    if _CANDIDATES.value and _STRENGTH.value != _STRENGTH.default:
      raise ValueError('--strength steers single tokens, so it has no use with --candidates')
    if not _CANDIDATES.value and _BLOCK.value != _BLOCK.default:
      raise ValueError('--block_tokens needs --candidates')
    experiment, params = loading.load(loading.config())
    system = [{'role': 'system', 'content': _SYSTEM.value}] if _SYSTEM.value else []
    if _CHAT.value:  # a tokenizer without a template, or one that has no system turn, refuses
      experiment.tokenizer.chat([*system, {'role': 'user', 'content': 'a'}])
    elif system:
      raise ValueError('--system is a turn of a chat: add --chat')
  with jax.set_mesh(experiment.mesh), cli.refusals():
    completer = Completer(
      experiment,
      params,
      max_new_tokens=_TOKENS.value,
      seed=_SEED.value,
      prefix=_PREFIX.value,
      stop=_STOP.value,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      scorer=loading.beside(_SCORER.value, experiment) if _SCORER.value else None,
      **_steering(),
    )
    if answered(experiment):
      note('the environment of this run answers nothing here: this is its first turn')
    revisions = dict(revise=_REVISE.value, request=_REQUEST.value)
    lines = _PROMPT.value or (typed_lines() if sys.stdin.isatty() else sys.stdin)
    if _CHAT.value:
      chat(completer, lines, _SYSTEM.value, **revisions)
    else:
      complete_lines(completer, lines, **revisions)


def _steering() -> dict:
  """How --scorer acts: on blocks, or on tokens."""
  if _CANDIDATES.value:
    return dict(candidates=_CANDIDATES.value, block_tokens=_BLOCK.value)
  return dict(strength=_STRENGTH.value, note=note)


if __name__ == '__main__':
  cli.run(main)
