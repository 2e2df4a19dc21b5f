"""Draws rows with a sampler: completions of one turn, or episodes of an environment."""

import collections
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from polgrad import environments
from polgrad.data.tokenizers import Tokenizer
from polgrad.models.policy import Policy
from polgrad.rewards.scoring import MESSAGES
from polgrad.sampling import stopping
from polgrad.sampling.sampler import make_sampler
from polgrad.sharding import to_host
from polgrad.types import Batch, Params, Prompts
from polgrad.types import turns as spans_of


class Episode(NamedTuple):
  """What was said in a row, turn by turn, and what the environment made of it."""

  turns: list[str]  # what the policy said
  observations: list[str]  # what it read after each turn; none after the last
  rewards: list[float]  # of the turns that were answered
  metrics: list[Mapping[str, float]]  # of the turns that were answered
  failure: tuple[str, str] | None  # (kind, reason): the environment failed, so the row is invalid


class Drawn(NamedTuple):
  """Rows of a sampler, NumPy, and their episodes."""

  batch: Batch
  episodes: Sequence[Episode] = ()  # [B]; () without an environment


# (parameter sets by name, prompts, their records, ids of sampling keys, *, seed, step) -> rows
Draws = Callable[..., Drawn]


class Turns(Protocol):
  """What settings of a sampler say of turns, see `collect.Sampling`."""

  environment: environments.Environment
  turn_tokens: int
  observation_tokens: int


def make_draws(
  turns: Turns,
  policies: Mapping[str, Policy],
  *,
  tokenizer: Tokenizer,
  policy: Policy,
  samples_per_prompt: int = 1,
  **settings: Any,
) -> Draws:
  """Makes the function that draws rows, of one turn or of several.

  Args:
    turns: the environment and its budgets.
    policies: as in `make_sampler`.
    tokenizer: says what ends a turn, and makes texts of tokens.
    policy: the model for the names that `policies` lacks.
    samples_per_prompt: rows of a prompt.
    settings: further ones of `make_sampler`.
  """
  sample = make_sampler(
    policies,
    default=policy,
    stop_ids=tokenizer.stop_ids,
    stop_table=stopping.for_policy(tokenizer, policy),
    pad_id=tokenizer.pad_id,
    samples_per_prompt=samples_per_prompt,
    **settings,
  )

  def draw(
    params: Mapping[str, Params], prompts: Prompts, records, ids, *, seed: int, step: int
  ) -> Drawn:
    del records
    arrays = prompts.tokens, prompts.mask, ids
    return Drawn(to_host(sample(params, *arrays, seed=seed, step=step)))

  return draw


def episode_seeds(seed: int, step: int, ids: Sequence[int], samples_per_prompt: int) -> list[int]:
  """One number in [0, 2**31) for each row: a resumed run draws the same ones.

  >>> episode_seeds(0, 3, [7], 2) == episode_seeds(0, 3, [5, 7], 2)[2:]
  True
  """
  fold = lambda i, sample: np.random.SeedSequence((seed % 2**32, step, i, sample))
  return [
    int(fold(int(i), sample).generate_state(1)[0] >> 1)
    for i in ids
    for sample in range(samples_per_prompt)
  ]


def with_turns(batch: Batch, episodes: Sequence[Episode]) -> Batch:
  """The batch with `turn_rewards`, `observation_ids` and `valid`, see `polgrad/arrays.py`."""
  rewards = np.zeros(batch.mask.shape, np.float32)
  anchors = np.zeros(batch.mask.shape, np.int32)
  for row, episode in enumerate(episodes):
    seen = batch.segment_ids[row] > 0
    begin = 0
    for number, span in enumerate(spans_of(batch.mask[row])):
      read = batch.tokens[row, begin : span.start][seen[begin : span.start]]
      anchors[row, span] = zlib.crc32(read.astype('<i4').tobytes()) >> 1
      if number < len(episode.rewards) and episode.failure is None:
        rewards[row, span.stop - 1] = episode.rewards[number]
      begin = span.stop
  valid = np.array([episode.failure is None for episode in episodes])
  return batch.with_arrays(turn_rewards=rewards, observation_ids=anchors, valid=valid)


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


def transcript(episode: Episode) -> str:
  """An episode as a text for people."""
  lines = []
  for number, said in enumerate(episode.turns):
    lines.append(f'[turn {number + 1}{_worth(episode, number)}] {said}')
    if number < len(episode.observations) and episode.observations[number]:
      lines.append(f'[read] {episode.observations[number]}')
  if episode.failure:
    lines.append(f'[failed] {": ".join(episode.failure)}')
  return '\n'.join(lines)


def _worth(episode: Episode, number: int) -> str:
  reward = episode.rewards[number] if number < len(episode.rewards) else 0.0
  return f', reward {reward:.4g}' if reward else ''


def failures(episodes: Sequence[Episode]) -> tuple[dict[str, int], list[str]]:
  """The number of failures by 'environment/kind', and the first of them in words."""
  found = [(row, *e.failure) for row, e in enumerate(episodes) if e.failure]
  counts = collections.Counter(f'environment/{kind}' for _, kind, _ in found)
  told = [f'row {row}: environment: {kind}: {why}' for row, kind, why in found]
  return dict(counts), told[:MESSAGES]


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


SHOWN = 8  # turns that have metrics of their own


def _size(span: slice) -> int:
  return span.stop - span.start
