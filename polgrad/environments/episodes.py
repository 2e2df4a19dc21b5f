"""The episodes of a rollout: each row of the sampler talks to an environment.

`Episodes` is what the sampler asks for replies (see `Replies`), and afterwards holds what was said and
what it was worth.
"""

import collections
import dataclasses
import functools
import queue
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments import conversation
from polgrad.environments.base import Replies
from polgrad.environments.workers import Pool, Reply, ready
from polgrad.rewards.scoring import MESSAGES
from polgrad.rewards.worker import Failure, words


@dataclasses.dataclass
class Episode:
  """What one row said and what it was worth, turn by turn."""

  turns: list[str] = dataclasses.field(default_factory=list)  # what the policy said
  # What it read after each turn: one entry fewer than `turns`, or the same number if the row had no room
  # left for another turn.
  observations: list[str] = dataclasses.field(default_factory=list)
  rewards: list[float] = dataclasses.field(default_factory=list)  # one for each turn
  metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)  # of each turn
  players: list[int] = dataclasses.field(default_factory=list)  # who took each turn, in self-play
  done: bool = False  # whether the environment has ended it
  failure: Failure | None = (
    None  # why it failed; then its row is invalid, and its rewards are unused
  )
  states: list[Any] = dataclasses.field(default_factory=list)  # before each turn, if they are kept

  @property
  def valid(self) -> bool:
    """Whether the environment has answered every turn."""
    return self.failure is None

  def answered(self, reply: Reply) -> None:
    """Notes the answer to a turn. Rewards of other players are added to the last turn of each."""
    for player, reward in reply.others.items():
      if player in self.players:
        last = len(self.players) - 1 - self.players[::-1].index(player)
        self.rewards[last] += reward
    self.rewards.append(reply.reward)
    self.metrics.append(reply.metrics)
    self.players.append(reply.player)
    self.done = reply.done

  def until(self, turn: int) -> 'Episode':
    """A copy of what was before the turn of this number, the first of which is 0."""
    lists = ('turns', 'observations', 'rewards', 'metrics', 'players', 'states')
    return Episode(**{name: getattr(self, name)[:turn] for name in lists})

  def without_states(self) -> 'Episode':
    """A copy that can no longer be continued: states may be large."""
    return dataclasses.replace(self, states=[])


class Episodes:
  """The episodes of the rows of one rollout, as the sampler asks for them (`Replies`).

  Rows are numbered prompt-major: row i is of the record i // samples_per_prompt. The first states are
  made at once, in the processes of the pool; each turn is answered while other rows are decoded.

  Args:
    pool: the environment, and where its calls run.
    tokenizer: of the policy, with the prefix and the stop strings of the sampler.
    records: of the prompts, as `Environment.opened` returns them; the environment gets these.
    samples_per_prompt: rows of each record.
    seeds: one for each row.
    observation_tokens: most tokens of the words of one message of an observation; a longer one is cut,
      and its turn has the metric `observation_cut`. 0: no limit.
    keep_states: whether the state before each turn is kept, also before a turn that is not taken, from
      which the episode can be continued.
    before: an episode for each record, whose states were kept, and the number of the turn at which the
      rows of the record continue it; empty: all rows begin anew.

  Attributes:
    episodes: one `Episode` for each row.
  """

  def __init__(
    self,
    pool: Pool,
    tokenizer: Tokenizer,
    records: Sequence[Mapping],
    *,
    samples_per_prompt: int,
    seeds: Sequence[int],
    observation_tokens: int = 0,
    keep_states: bool = False,
    before: Sequence[tuple[Episode, int]] = (),
  ):
    rows = len(records) * samples_per_prompt
    if len(seeds) != rows:
      raise ValueError(f'{len(seeds)} seeds for {rows} rows')
    self._pool, self._tokenizer, self._limit = pool, tokenizer, observation_tokens
    self._records = [record for record in records for _ in range(samples_per_prompt)]
    self.episodes = [Episode() for _ in range(rows)]
    self._stopped = [False] * rows  # whether the last turn of a row ended with a stop token
    self._pending = 0  # rows that have asked and were not answered
    self._answers = queue.SimpleQueue()  # (row, future of the answer)
    self._keep = keep_states
    if before:
      begun = [one for one in before for _ in range(samples_per_prompt)]
      self.episodes = [episode.until(turn) for episode, turn in begun]
      self._states = [ready(episode.states[turn]) for episode, turn in begun]
    else:
      self._states = [pool.reset(record, seed) for record, seed in zip(self._records, seeds)]

  def ask(self, row: int, ids: Sequence[int], ended: bool) -> None:
    """Hands in a turn; see `Replies.ask`."""
    record, episode = self._records[row], self.episodes[row]
    templated, first = 'messages' in record, not episode.turns
    opened = self._tokenizer.opening if templated else ''
    text = conversation.turn_text(
      ids,
      self._tokenizer,
      ended=ended,
      opened=batching.opening(record, self._tokenizer) if first else opened,
      begun=record.get('begun', ()) if first else (),
    )
    episode.turns.append(text)
    self._stopped[row] = bool(len(ids)) and int(ids[-1]) in self._tokenizer.stop_ids
    self._pending += 1
    # The step begins when the state is there, which only a first turn may have to wait for.
    self._states[row].add_done_callback(functools.partial(self._step, row, text))

  def _step(self, row: int, text: str, state: futures.Future) -> None:
    if state.exception() is not None or isinstance(state.result(), Failure):
      self._answers.put((row, state))
      return
    answer = self._pool.step(state.result(), text)
    answer.add_done_callback(lambda answer: self._answers.put((row, answer)))

  def take(self, wait: bool) -> list[tuple[int, list[int] | None]]:
    """The replies that have come since the last call, by row; see `Replies.take`.

    Raises:
      RuntimeError: no process can be started, or no row has asked and `wait` is set.
    """
    if wait and not self._pending:
      raise RuntimeError('nothing to wait for: no row has asked')
    answers = [self._answers.get()] if wait else []
    while not self._answers.empty():
      answers.append(self._answers.get())
    self._pending -= len(answers)
    replies = [(row, self._reply(row, answer.result())) for row, answer in answers]
    return sorted(replies, key=lambda reply: reply[0])

  def _reply(self, row: int, answer: Any) -> list[int] | None:
    """Notes what the environment answered, and returns the tokens to append; None ends the row."""
    episode = self.episodes[row]
    state = self._states[row].result()
    if self._keep and not isinstance(state, Failure) and len(episode.states) < len(episode.turns):
      episode.states.append(state)
    if isinstance(answer, Failure):
      episode.failure = answer
      return None
    reply: Reply = answer
    episode.answered(reply)
    if reply.done or len(episode.turns) >= self._pool.environment.max_turns:
      return None
    try:
      read = conversation.between(
        reply.observation,
        self._records[row],
        self._tokenizer,
        stopped=self._stopped[row],
        limit=self._limit,
      )
    except Exception as error:  # of a template, or of a tokenizer that lacks the characters
      episode.failure = Failure('Unreadable', f'its observation: {words(error)}')
      return None
    episode.observations.append(read.text)
    if self._limit:
      reply.metrics['observation_cut'] = float(read.cut)
    self._states[row] = ready(reply.state)
    if self._keep:
      episode.states.append(reply.state)
    return read.ids


def failures(episodes: Sequence[Episode]) -> tuple[dict[str, int], list[str]]:
  """The number of rows that failed by 'environment/kind', and row, turn and reason of the first few."""
  failed = [(row, e) for row, e in enumerate(episodes) if not e.valid]
  counts = collections.Counter(f'environment/{e.failure.kind}' for _, e in failed)
  messages = [
    f'row {row}: environment, turn {len(e.turns)}: {e.failure.kind}: {e.failure.reason}'
    for row, e in failed[:MESSAGES]
  ]
  return dict(counts), messages


class Within:
  """Replies to rows that have fewer columns than the sampler gives them (`Replies`).

  Tokens that a turn draws beyond the columns of its row are not handed on, and the row is over. A row is
  also over if its reply leaves no room for another token.

  Args:
    replies: to rows with all columns.
    room: columns of each row behind its prompt.

  Attributes:
    unfinished: rows that are over because their columns are used up.
  """

  def __init__(self, replies: Replies, room: Sequence[int]):
    self._replies, self._room = replies, list(room)
    self.unfinished: set[int] = set()

  def ask(self, row: int, ids: Sequence[int], ended: bool) -> None:
    left = self._room[row]
    self._room[row] -= len(ids)
    self._replies.ask(row, ids[:left], ended and len(ids) <= left)

  def take(self, wait: bool) -> list[tuple[int, list[int] | None]]:
    return [(row, self._fitting(row, ids)) for row, ids in self._replies.take(wait)]

  def _fitting(self, row: int, ids: list[int] | None) -> list[int] | None:
    left = self._room[row]
    if left >= 0 and (ids is None or len(ids) < left):
      self._room[row] -= len(ids or ())
      return ids
    self.unfinished.add(row)
    return None


class Single:
  """Replies that end every row after one turn, and keep what it would have read (`Replies`).

  Args:
    replies: to rows that may have several turns.
    rows: number of rows.

  Attributes:
    read: by row, the tokens of the reply; None where the row is over.
  """

  def __init__(self, replies: Replies, rows: int):
    self._replies = replies
    self.read: list[list[int] | None] = [None] * rows

  def ask(self, row: int, ids: Sequence[int], ended: bool) -> None:
    self._replies.ask(row, ids, ended)

  def take(self, wait: bool) -> list[tuple[int, None]]:
    taken = self._replies.take(wait)
    for row, ids in taken:
      self.read[row] = ids
    return [(row, None) for row, _ in taken]
