"""Observations as tokens: what a chat template writes between two turns of the policy.

Nothing that was drawn is rendered or tokenised again. The template writes a conversation whose last
assistant turn has a sentinel for words, and what follows the sentinel is taken: the end of the turn, the
observation, and the beginning of the next turn. So it does not matter what a template changes in turns
before that, for example that it removes their thoughts: rows only grow.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from polgrad.data import stops
from polgrad.data.chat import MARK
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments.base import Environment

CUT = ' [...]'  # ends the words of an observation that was cut
CALLED = {'name': 'calculate', 'tool_call_id': 'call00000'}  # what some templates want of a result
CHARACTERS = 32  # of a token, at most, in what is cut


class Between(NamedTuple):
  """What the policy reads between two turns."""

  ids: list[int]
  text: str  # the words of the observation, without what the template writes around them
  cut: bool  # whether they were longer than the limit


def between(
  observation: str | Sequence[Mapping],
  record: Mapping,
  tokenizer: Tokenizer,
  *,
  stopped: bool,
  limit: int = 0,
) -> Between:
  """The tokens from the end of a turn to the beginning of the next one.

  A record with `messages` goes through the chat template of the tokenizer; an observation that is text
  is a user turn there. To a record with a `prompt`, which is text, the observation is added word for
  word. The observation is tokenised alone.

  Args:
    observation: a text, or messages.
    record: of the row, as its prompt was made.
    tokenizer: of the policy.
    stopped: whether the policy drew a stop token at the end of its turn; otherwise that of the
      template is part of the result.
    limit: most tokens of the words of each message; 0: no limit.

  Raises:
    ValueError: the template refuses the messages, there is no place after the turn, the words cannot be
      encoded, or there is nothing to read.
  """
  if isinstance(observation, str):
    observation = [{'role': 'user', 'content': observation}]
  messages, cut = [], False
  for message in observation:
    words, was_cut = shortened(message['content'].replace(MARK, ''), tokenizer, limit)
    messages.append({**message, 'content': words})
    cut |= was_cut
  text = '\n'.join(message['content'] for message in messages)
  if 'messages' in record:
    ids = _after_stop(encode(following(messages, record, tokenizer), tokenizer), tokenizer, stopped)
  else:
    ids = encode(text, tokenizer)
  if not ids:
    raise ValueError('an observation without any token: the next turn needs one before it')
  return Between(ids, text, cut)


def following(messages: Sequence[Mapping], record: Mapping, tokenizer: Tokenizer) -> str:
  """What the chat template writes after the words of an assistant turn that these messages follow.

  Raises:
    ValueError: the template refuses the messages, or does not write the turn exactly once.
  """
  turn = {'role': 'assistant', 'content': MARK}
  text = tokenizer.chat([*record['messages'], turn, *messages], tools=record.get('tools'))
  if text.count(MARK) != 1:
    raise ValueError(
      'the text after a turn is not known: the chat template does not write an assistant turn before '
      f'a message of the role {messages[0]["role"]!r} exactly once and unchanged'
    )
  return text.partition(MARK)[2]


def check(environment: Environment, record: Mapping, tokenizer: Tokenizer) -> None:
  """Refuses a tokenizer that cannot write the observations of an environment.

  Args:
    record: any record of the data, as `Environment.opened` returns it.

  Raises:
    ValueError: says which role the chat template refuses or does not write.
  """
  if 'messages' not in record:
    return
  name = type(environment).__name__
  for role in environment.roles:
    written = []
    for words in ('1', '2'):
      try:
        message = {'role': role, 'content': words, **(CALLED if role == 'tool' else {})}
        written.append(following([message], record, tokenizer))
      except ValueError as error:
        raise ValueError(f'{name}: observations have the role {role!r}: {error}') from error
    if written[0] == written[1]:
      raise ValueError(
        f'{name}: observations have the role {role!r}, of which the chat template writes nothing'
      )


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
  """The ids of a text that follows other tokens.

  Some tokenizers put a space before a text, except behind a special token. So the text is read behind
  the stop token, where the tokenizer finds that token in a text.
  """
  stop = tokenizer.stop_ids[0]
  try:
    ids = tokenizer.encode(f'{tokenizer.name(stop)}{text}')
  except ValueError:  # the name of the stop token is no text of this tokenizer
    ids = []
  return ids[1:] if ids[:1] == [stop] else tokenizer.encode(text)


def _after_stop(ids: list[int], tokenizer: Tokenizer, stopped: bool) -> list[int]:
  """The ids of `following`, without the stop token and the space before it if the policy drew one."""
  if stopped:
    for i, token in enumerate(ids):
      if token in tokenizer.stop_ids:
        return ids[i + 1 :]
      if tokenizer.decode([token]).strip():
        break
  return ids


def shortened(text: str, tokenizer: Tokenizer, limit: int) -> tuple[str, bool]:
  """The text, cut and marked if it has more than `limit` tokens (0: any number), and whether it was."""
  fits = lambda words: len(tokenizer.encode(words)) <= limit
  start = text[: limit * CHARACTERS + 1]  # of a long text, the rest is not tokenised
  if not limit or (start == text and fits(text)):
    return text, False
  try:
    mark = CUT if len(tokenizer.encode(CUT)) < limit else ''
  except ValueError:  # the tokenizer has no such characters
    mark = ''
  low, high = 0, len(start)  # the first `low` characters fit
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(start[:middle] + mark) else (low, middle - 1)
  return start[:low] + mark, True


def turn_text(
  ids: Sequence[int], tokenizer: Tokenizer, *, ended: bool, opened: str = '', begun: Any = ()
) -> str:
  """What the policy said in a turn, without the stop token and up to its first stop string.

  Args:
    ids: the tokens that it drew.
    tokenizer: of the policy, with its stop strings.
    ended: whether a stop token or string ended the turn.
    opened: what the prompt has written of the turn.
    begun: tokens of the turn that were given; they are decoded together with the drawn ones.
  """
  ids = [*begun, *map(int, ids)]
  stopped = ended and ids and ids[-1] in tokenizer.stop_ids
  text = tokenizer.decode(ids[:-1] if stopped else ids)
  return opened + stops.through(text, tokenizer.stop_strings)
