"""Lets an environment answer an empty turn on some records, before a run."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from polgrad.checks.findings import Finding, some
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments import conversation
from polgrad.rewards.worker import Failure, words


class Answer(NamedTuple):
  """What an environment answered to an empty turn."""

  row: int  # of the source
  seconds: float  # to begin the episode and to answer
  said: str  # what the policy would read; '' if the episode is over
  reward: float
  done: bool
  failure: Failure | None


def answers(reader: Any, records: Sequence[Mapping], tokenizer: Tokenizer) -> list[Answer]:
  """The answers on some records.

  Args:
    reader: what lays the records out, with an environment: a collector or the evaluation.
    records: with `id`, the row of the source.
    tokenizer: of the run.

  Raises:
    ValueError: the chat template cannot write what the environment says.
    RuntimeError: the processes of the environment cannot start.
  """
  opened = reader.opened(records)
  conversation.check(reader.environment, opened[0], reader.own(tokenizer))
  found = []
  for record in opened:
    begun = time.monotonic()
    reply = reader.pool.reset(record, 0).result()
    if not isinstance(reply, Failure):
      reply = reader.pool.step(reply, '').result()
    seconds = time.monotonic() - begun
    if isinstance(reply, Failure):
      found.append(Answer(record['id'], seconds, '', 0.0, True, reply))
    else:
      said = reply.observation
      said = said if isinstance(said, str) else '\n'.join(one['content'] for one in said)
      failure = None
      if not reply.done and reader.environment.max_turns > 1:
        failure = _unreadable(reply.observation, record, reader.own(tokenizer))
      found.append(Answer(record['id'], seconds, said, reply.reward, reply.done, failure))
  return found


def _unreadable(
  observation: str | Sequence[Mapping], record: Mapping, tokenizer: Tokenizer
) -> Failure | None:
  """Why the policy could not read an observation; None if it can."""
  try:
    conversation.between(observation, record, tokenizer, stopped=True)
  except Exception as error:  # of a template, or of a tokenizer that lacks the characters
    return Failure('Unreadable', f'its observation: {words(error)}')
  return None


def findings(path: str, found: Sequence[Answer], place: Callable[[int], str]) -> list[Finding]:
  """What is wrong with the answers.

  Args:
    path: of the environment in the configuration.
    place: what a person calls a row of the source.
  """
  failed = [one for one in found if one.failure]
  if not failed:
    return []
  first = failed[0].failure
  every = len(failed) == len(found)
  which = f'all of {len(found)} records' if every else some([one.row for one in failed], place)
  text = f'it fails on {which}, where it answers an empty turn ({first.kind}: {first.reason})'
  mend = 'a turn that makes no sense should be answered too'
  if first.kind == 'Unreadable':
    mend = 'before its next turn the policy needs something to read that its tokenizer can write'
  return [Finding(path, text, mend, fails=every)]
