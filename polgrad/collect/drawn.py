"""Draws rows with a sampler: completions of one turn, or episodes of an environment."""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polgrad import environments, exchanges
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments.episodes import Episode, Episodes, Single, Within
from polgrad.environments.workers import Pool
from polgrad.models.policy import Policy
from polgrad.registry import AtLeastOne, Count, NotNegative, Positive
from polgrad.rewards.worker import words
from polgrad.sampling import engines, stopping
from polgrad.sampling.turns import make_turn_sampler
from polgrad.sharding import to_host
from polgrad.types import Batch
from polgrad.types import turns as spans_of

SHOWN = 8  # turns that have metrics, from the first one


class Drawn(NamedTuple):
  """Rows of a sampler, NumPy, and their episodes."""

  batch: Batch
  episodes: Sequence[Episode] = ()  # [B]; () without an environment
  # [B], the reply that a row would have read next, if a single turn was drawn; None where it is over.
  read: Sequence[list[int] | None] = ()
  # i32[B], passes of the models over each row, if several tokens were checked in one, see `speculation`.
  passes: np.ndarray | None = None


class Begun(NamedTuple):
  """Episodes that rows continue, an entry for each prompt."""

  episodes: Sequence[tuple[Episode, int]]  # and the number of the turn that comes next
  room: Sequence[int]  # columns that the rows have behind their prompt


# (parameter sets by name, prompts, their records, ids of sampling keys, *, seed, step) -> rows. In an
# environment also `begun`, and `single`, which ends rows after one turn.
Draws = Callable[..., Drawn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
  """The environment of a collector or of the evaluation, its budgets and its limits."""

  # What answers the turns of the policy (docs/environments.md). By default nothing does: a completion is
  # one turn.
  environment: environments.Part = environments.OneTurn
  # Tokens that the policy may draw in one turn; 0: only the row has a limit, `max_new_tokens`.
  turn_tokens: Count = 0
  # Tokens of a message that the policy reads; a longer one is cut. 0: only the row has a limit.
  observation_tokens: Count = 0
  # Processes that the environment runs in, and so turns that it answers at the same time.
  environment_workers: AtLeastOne = 2
  # Seconds that it may take for one turn.
  environment_timeout: Positive = 10.0
  # GiB of address space of each of its processes; 0: no limit.
  environment_memory: NotNegative = 4.0
  # False runs it in the process of the trainer, where nothing limits it.
  isolate_environment: bool = True

  @property
  def has_environment(self) -> bool:
    """Whether an environment answers the turns of the policy."""
    one = environments.OneTurn
    return self.environment is not one and not isinstance(self.environment, one)

  @property
  def keeps_states(self) -> bool:
    """Whether episodes keep the states before their turns, so that they can be continued."""
    return False

  def check_turns(self, path: str) -> None:
    """Refuses budgets of turns where no environment answers."""
    for knob in ('turn_tokens', 'observation_tokens'):
      if getattr(self, knob) and not self.has_environment:
        raise ValueError(f'{path}: {knob} is a budget of turns, but there is no environment')

  @functools.cached_property
  def pool(self) -> Pool:
    """The processes of the environment; they start with the first turn, or `begin`."""
    return Pool(
      self.environment,
      workers=self.environment_workers,
      timeout_s=self.environment_timeout,
      memory_gib=self.environment_memory,
      isolate=self.isolate_environment,
    )

  def begin(self, rows: int) -> None:
    """Starts processes of the environment in the background, for a number of rows."""
    if self.has_environment and talks():
      self.pool.begin(rows)

  def opened(self, records: Sequence[dict]) -> list[dict]:
    """The records that prompts are made of.

    Raises:
      ValueError: the environment makes no record with a prompt of one; names it.
    """
    if not self.has_environment:
      return list(records)
    return [_opened(self.environment, record) for record in records]


def talks() -> bool:
  """Whether this process talks to environments: the first one alone does, and tells the others."""
  return jax.process_index() == 0


def _opened(environment: environments.Environment, record: dict) -> dict:
  """The record that a prompt is made of."""
  said = f'record {record["id"]}: {type(environment).__name__}.opened'
  try:
    found = environment.opened(record)
  except ValueError:  # says itself what is wrong
    raise
  except Exception as error:  # whatever an environment raises
    raise ValueError(f'{said}: {type(error).__name__}: {words(error)}') from error
  if not isinstance(found, Mapping) or not {'prompt', 'messages'} & set(found):
    raise ValueError(f'{said}: expected a record with a prompt or messages, got {found!r:.80}')
  return {**found, 'id': record['id']}


def make_draws(
  settings: Turns,
  policies: Mapping[str, Policy],
  *,
  tokenizer: Tokenizer,
  policy: Policy,
  samples_per_prompt: int = 1,
  engine: engines.Own | engines.External = engines.OWN,
  **sampler: Any,
) -> Draws:
  """Makes the function that draws rows, of one turn or of several.

  Args:
    settings: the environment.
    policies: as in `make_sampler`.
    tokenizer: says what ends a turn, and makes texts of tokens.
    policy: the model for the names that `policies` lacks.
    samples_per_prompt: rows of a prompt.
    engine: what draws rows of one turn, and how exactly polgrad's own sampler computes.
    sampler: further settings of `make_sampler`.
  """
  several = settings.has_environment
  make = make_turn_sampler if several else engine.sampler
  sample = make(
    {name: engine.drawn_from(one) for name, one in policies.items()},
    default=engine.drawn_from(policy),
    stop_ids=tokenizer.stop_ids,
    stop_table=stopping.for_policy(tokenizer, policy),
    pad_id=tokenizer.pad_id,
    samples_per_prompt=samples_per_prompt,
    **sampler,
    **({'turn_tokens': settings.turn_tokens} if several else {}),
  )

  def in_one_turn(params, prompts, records, ids, *, seed, step) -> Drawn:
    del records
    batch = to_host(sample(params, prompts.tokens, prompts.mask, ids, seed=seed, step=step))
    features = dict(batch.features)
    passes = features.pop('passes', None)
    return Drawn(batch.replace(features=features), passes=passes)

  def in_turns(
    params, prompts, records, ids, *, seed, step, begun: Begun | None = None, single: bool = False
  ) -> Drawn:
    replies = talks() and Episodes(
      settings.pool,
      tokenizer,
      settings.opened(records),
      samples_per_prompt=samples_per_prompt,
      seeds=engines.row_seeds(seed, step, ids, samples_per_prompt),
      observation_tokens=settings.observation_tokens,
      keep_states=settings.keeps_states,
      before=begun.episodes if begun else (),
    )
    # Rows that continue an episode have fewer columns left than the sampler gives them.
    asked = replies
    if begun and replies:
      asked = within = Within(replies, np.repeat(begun.room, samples_per_prompt))
    if single and replies:
      asked = one = Single(asked, len(ids) * samples_per_prompt)
    batch = sample(
      params, prompts.tokens, prompts.mask, ids, seed=seed, step=step, replies=asked or None
    )
    read = exchanges.first(lambda: one.read, 'replies') if single else ()
    episodes = exchanges.first(lambda: replies.episodes, 'episodes')
    batch = to_host(batch)
    if begun is None:
      return Drawn(with_turns(batch, episodes), episodes, read)
    cut = exchanges.first(lambda: sorted(within.unfinished), 'episodes that are not over')
    over = np.isin(np.arange(len(episodes)), cut)
    return Drawn(batch.replace(finished=batch.finished & ~over), episodes, read)

  return in_turns if several else in_one_turn


def with_turns(batch: Batch, episodes: Sequence[Episode]) -> Batch:
  """The batch with the arrays of turns and `valid`, see `polgrad/arrays.py`."""
  players = np.zeros(batch.mask.shape, np.int32)
  rewards = np.zeros(batch.mask.shape, np.float32)
  anchors = np.zeros(batch.mask.shape, np.int32)
  void = np.zeros(batch.mask.shape, np.float32)
  for row, episode in enumerate(episodes):
    seen = batch.segment_ids[row] > 0
    begin = 0
    for number, span in enumerate(spans_of(batch.mask[row])):
      # What was read between the last turn and this one, hashed to a positive i32.
      read = batch.tokens[row, begin : span.start][seen[begin : span.start]]
      anchors[row, span] = zlib.crc32(read.astype('<i4').tobytes()) >> 1 or 1
      # A turn that was not answered has no reward.
      if number < len(episode.rewards) and episode.valid:
        rewards[row, span.stop - 1] = episode.rewards[number]
        players[row, span] = episode.players[number]
        void[row, span] = episode.metrics[number].get('void', 0.0)
      begin = span.stop
  valid = np.array([episode.valid for episode in episodes])
  return batch.with_arrays(
    turn_rewards=rewards,
    observation_ids=anchors,
    turn_players=players,
    void_turns=void,
    valid=valid,
  )


def with_rewards(batch: Batch, rewards: np.ndarray) -> Batch:
  """The batch with these rewards f32[B]; of a row with turns, the last one gets the difference."""
  batch = batch.replace(rewards=rewards)
  if 'turn_rewards' not in batch:
    return batch
  by_turn = np.where(batch.valid[:, None], batch['turn_rewards'], np.float32(0))
  for row, spans in enumerate(map(spans_of, batch.mask)):
    if spans and batch.valid[row]:
      by_turn[row, spans[-1].stop - 1] += rewards[row] - by_turn[row].sum()
  return batch.with_arrays(turn_rewards=by_turn)


def earned(rows: Drawn) -> np.ndarray:
  """The rewards of the environment by row, f64[B]: NaN where it failed, 0 without one."""
  if not rows.episodes:
    return np.zeros(len(rows.batch.tokens))
  return np.array([sum(e.rewards, 0.0) if e.valid else np.nan for e in rows.episodes])


def transcript(episode: Episode) -> str:
  """An episode as a text for people."""
  lines = []
  for number, said in enumerate(episode.turns):
    lines.append(f'[turn {number + 1}{_worth(episode, number)}] {said}')
    if number < len(episode.observations) and episode.observations[number]:
      lines.append(f'[read] {episode.observations[number]}')
  if episode.failure:
    lines.append(f'[failed] {episode.failure.kind}: {episode.failure.reason}')
  return '\n'.join(lines)


def _worth(episode: Episode, number: int) -> str:
  reward = episode.rewards[number] if number < len(episode.rewards) else 0.0
  return f', reward {reward:.4g}' if reward else ''


def metrics(batch: Batch, episodes: Sequence[Episode]) -> dict[str, float]:
  """Means by turn: how many there are, how long, what reward; and the numbers of the environment.

  * `turns`: turns of a row.
  * `turns/N/share`, `/length`, `/reward`: of the rows that have turn N (from 1), their share, its tokens
    and its reward, for the first `SHOWN` turns; rewards are of valid rows.
  * `environment/NAME`: of the turns whose answer has this number, its mean.
  """
  spans = [spans_of(mask) for mask in batch.mask]
  found = {'turns': float(np.mean([len(s) for s in spans]))}
  for n in range(min(max(map(len, spans), default=0), SHOWN)):
    rows = [row for row, s in enumerate(spans) if len(s) > n]
    found[f'turns/{n + 1}/share'] = len(rows) / len(spans)
    found[f'turns/{n + 1}/length'] = float(np.mean([_size(spans[row][n]) for row in rows]))
    kept = [batch['turn_rewards'][row, spans[row][n]].sum() for row in rows if batch.valid[row]]
    if kept:
      found[f'turns/{n + 1}/reward'] = float(np.mean(kept))
  values = collections.defaultdict(list)
  for one in (one for episode in episodes for one in episode.metrics):
    for name, value in one.items():
      values[f'environment/{name}'].append(float(value))
  return found | {name: float(np.mean(x)) for name, x in sorted(values.items())}


def _size(span: slice) -> int:
  return span.stop - span.start
