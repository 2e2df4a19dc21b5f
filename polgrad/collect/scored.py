"""Scores sampled rows on the host: texts, rewards, groups, demonstrations, what to report."""

import collections
import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polgrad import exchanges
from polgrad.collect import drawn
from polgrad.collect.base import Context
from polgrad.collect.drawn import Drawn, Episode
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.environments import conversation
from polgrad.environments.episodes import failures
from polgrad.rewards.scoring import MESSAGES, Scores
from polgrad.types import Batch, turns


class Texts(NamedTuple):
  """What the host knows of scored rows besides their `Batch`."""

  completions: Sequence[str]  # [B], decoded
  records: list[dict]  # [N], data records of the prompts
  scores: Scores  # of the completions, by term, with errors and messages
  episodes: Sequence[Episode] = ()  # [B]; () without an environment


class Lazy(Sequence):
  """A sequence whose entries are made when they are first read."""

  def __init__(self, size: int, make: Callable[[int], Any]):
    self._made = [functools.cache(functools.partial(make, i)) for i in range(size)]

  def __len__(self) -> int:
    return len(self._made)

  def __getitem__(self, place: int | slice) -> Any:
    found = self._made[place]
    return [one() for one in found] if isinstance(place, slice) else found()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and list(self) == list(other)


def question(record: Mapping) -> str:
  """What a table of samples shows of a record."""
  return record['prompt'] if 'prompt' in record else record['messages'][-1]['content']


def completions(
  batch: Batch,
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  episodes: Sequence[Episode] = (),
) -> Sequence[str]:
  """The text of each row's completion, without the stop token that ended it; of turns, the last one.

  A text is made when it is first read, so each of several processes makes only those that it reads.

  It is the whole assistant turn: what the prompt has written of it, such as `<think>` by the chat
  template, the `prefix` or the tokens `begun`, comes first. Of special tokens only stop, pad and bos
  tokens are left out. It ends with the first stop string that was sampled, if any: what the last token
  adds behind that is left out.

  Args:
    records: of the prompts, in the order of the rows; each has the same number of rows.
    episodes: of the rows, where they have several turns; verifiers judge what the environment was told.
  """
  if episodes:
    return [episode.turns[-1] if episode.turns else '' for episode in episodes]
  rows_per_prompt = len(batch.tokens) // len(records)

  def text(i: int) -> str:
    record = records[i // rows_per_prompt]
    return conversation.turn_text(
      batch.tokens[i][_last_turn(batch.mask[i])],
      tokenizer,
      ended=batch.finished[i],
      opened=batching.opening(record, tokenizer),
      begun=record.get('begun', ()),
    )

  return Lazy(len(batch.tokens), text)


def _last_turn(mask: np.ndarray) -> slice:
  return turns(mask)[-1] if mask.any() else slice(0, 0)


def score_rows(rows: Drawn, records: Sequence[dict], context: Context) -> tuple[Batch, Texts]:
  """Decodes sampled rows (NumPy) and fills in `rewards` and `valid`.

  Args:
    rows: where they are episodes, with `turn_rewards` and `valid`; rewards of verifiers are added to
      those of the environment, and both must have answered.
    records: of the prompts.
  """
  batch, episodes = rows.batch, rows.episodes
  texts = completions(batch, records, context.tokenizer, episodes)
  lengths = batch.mask.sum(axis=1)
  rows_per_prompt = len(texts) // len(records)
  opened = context.opened(records)
  # Each process verifies some rows, and gets the scores of all.
  mine = exchanges.strided(range(len(texts)))
  judge = lambda: context.score(
    [texts[i] for i in mine],
    [records[i // rows_per_prompt] for i in mine],
    [int(lengths[i]) for i in mine],
    also_read(
      batch,
      mine,
      [opened[i // rows_per_prompt] for i in mine],
      context.tokenizer,
    ),
  )
  scores = _joined_scores(exchanges.every(judge, 'rewards'))
  valid, total = scores.valid, scores.total
  if episodes:
    valid = valid & batch.valid
    earned = drawn.earned(rows)
    total = total + earned
    failed, messages = failures(episodes)
    scores = scores._replace(
      components={'environment': earned, **scores.components},
      errors=scores.errors | failed,
      messages=messages + scores.messages,
    )
  rewards = np.where(valid, total, 0.0).astype(np.float32)
  batch = drawn.with_rewards(batch.replace(valid=valid), rewards)
  return batch, Texts(texts, list(records), scores, list(episodes))


def compare_groups(
  batch: Batch, records: Sequence[dict], context: Context
) -> tuple[Batch, dict[str, int], list[str]]:
  """Fills in `wins` f32[B, G]: wins[b, j] is the probability that row b beats row j of its group.

  Each pair of different texts is compared once, equal texts have 1/2. So has a comparison that failed,
  or that has a row that is not valid; both rows of a comparison that failed are not `valid`.

  Args:
    batch: scored rows, NumPy.
    records: of the prompts, in the order of the rows.

  Returns:
    The batch, the number of failures by 'comparison/kind', and the first of them in words.
  """
  size = len(batch.tokens) // len(records)
  starts = size * np.arange(len(records))[:, None]
  first, second = np.triu_indices(size, 1)
  pairs = np.stack([starts + first, starts + second], axis=-1).reshape(-1, 2)
  found, errors, messages = _compare(batch, batch, pairs, records, context)
  wins = np.full((len(batch.tokens), size), 0.5, np.float32)
  one, other = pairs.T
  wins[one, other % size] = np.where(np.isnan(found), 0.5, found)
  wins[other, one % size] = 1 - wins[one, other % size]
  valid = batch.valid.copy()
  valid[pairs[np.isnan(found)].reshape(-1)] = False
  return batch.with_arrays(wins=wins, valid=valid), errors, messages


def compare_with(
  batch: Batch, others: Batch, records: Sequence[dict], context: Context
) -> tuple[Batch, dict[str, int], list[str]]:
  """Fills in `baseline_wins` f32[B, n]: the probability that row b beats other row j of its prompt.

  A row with a comparison that failed is not `valid`. For the rest see `compare_groups`.
  """
  rows, number = len(batch.tokens), len(others.tokens) // len(records)
  group = np.arange(rows) // (rows // len(records))
  pairs = np.stack(
    [np.repeat(np.arange(rows), number), (number * group[:, None] + np.arange(number)).reshape(-1)],
    axis=-1,
  )
  found, errors, messages = _compare(batch, others, pairs, records, context)
  found = found.reshape(rows, number)
  batch = batch.with_arrays(
    baseline_wins=np.where(np.isnan(found), 0.5, found).astype(np.float32),
    valid=batch.valid & ~np.isnan(found).any(axis=1),
  )
  return batch, errors, messages


def _compare(
  batch: Batch, others: Batch, pairs: np.ndarray, records: Sequence[dict], context: Context
) -> tuple[np.ndarray, dict[str, int], list[str]]:
  """P(row pairs[k, 0] of `batch` beats row pairs[k, 1] of `others`), f64[n]; NaN where it failed.

  It is 1/2 where a row is not valid, or the texts are equal: these are not asked.
  """
  texts = completions(batch, records, context.tokenizer)
  rivals = texts if others is batch else completions(others, records, context.tokenizer)
  size = len(texts) // len(records)
  asked = [
    k
    for k, (i, j) in enumerate(pairs)
    if batch.valid[i] and others.valid[j] and texts[i] != rivals[j]
  ]
  # Each process compares some pairs, and gets the results of all.
  own = exchanges.strided(asked)
  given = [
    {
      'first': texts[i],
      'second': rivals[j],
      'record': records[i // size],
      'first_reward': float(batch.rewards[i]),
      'second_reward': float(others.rewards[j]),
    }
    for i, j in pairs[own]
  ]
  prompt = lambda: [
    batching.prompt_text(one, context.tokenizer)
    for one in context.opened([pair['record'] for pair in given])
  ]
  compared = exchanges.every(lambda: context.compare(given, {'prompt': prompt}), 'comparisons')
  found = np.full(len(pairs), 0.5)
  found[asked] = exchanges.interleaved([one.wins for one in compared])
  return found, *failures_of(compared)


def also_read(
  batch: Batch, rows: Sequence[int], records: Sequence[Mapping], tokenizer: Tokenizer
) -> dict[str, Callable[[], list]]:
  """What verifiers read of some rows besides text, record and length, see `scoring.make_scorer`.

  Args:
    records: of these rows.
  """
  return {
    'prompt': lambda: [batching.prompt_text(record, tokenizer) for record in records],
    'tokens': lambda: [batch.tokens[i][batch.mask[i]].tolist() for i in rows],
  }


def _joined_scores(parts: Sequence[Scores]) -> Scores:
  """The scores of all rows, of which each process has judged those of `exchanges.strided`."""
  errors, messages = failures_of(parts)
  return Scores(
    total=exchanges.interleaved([one.total for one in parts]),
    components={
      k: exchanges.interleaved([p.components[k] for p in parts]) for k in parts[0].components
    },
    valid=exchanges.interleaved([one.valid for one in parts]),
    errors=errors,
    messages=messages,
  )


def failures_of(parts: Sequence[Any]) -> tuple[dict[str, int], list[str]]:
  """The `errors` of all processes, and the first `messages`, whose rows are numbered by process."""
  errors = dict(sum((collections.Counter(one.errors) for one in parts), collections.Counter()))
  return errors, [text for one in parts for text in one.messages][:MESSAGES]


def distinct(ids: np.ndarray, before: Sequence[int] = ()) -> np.ndarray:
  """Ids for sampling keys, all different: a prompt that a step has twice draws other noise.

  Args:
    ids: of the prompts.
    before: ids of prompts that the step has drawn already.
  """
  seen = collections.Counter(before)
  out = []
  for i in ids.tolist():
    out.append((i + seen[i] * 0x9E3779B1) % 2**31)  # a step beyond the rows of any data set
    seen[i] += 1
  return np.asarray(out, np.int32)


def informative(
  batch: Batch, texts: Texts, rows_per_prompt: int, ignored: Collection[str] = ()
) -> np.ndarray:
  """bool[N]: groups whose valid rows do not all have the same reward.

  Args:
    ignored: terms of the reward that are not compared. If any are named, a group is informative where
      one of the other terms differs.
  """
  components = texts.scores.components.items()
  compared = [x for name, x in components if name not in ignored] if ignored else [batch.rewards]
  differs = np.zeros(len(batch.valid) // rows_per_prompt, bool)
  with warnings.catch_warnings(action='ignore', category=RuntimeWarning):  # a group of failures
    for values in compared:
      values = np.where(batch.valid, values, np.nan).reshape(-1, rows_per_prompt)
      differs |= np.nanmax(values, axis=1) > np.nanmin(values, axis=1)
  return differs


def pooled(prompt_ids: np.ndarray) -> np.ndarray:
  """Numbers of groups i32[B] that are equal for all rows of one prompt, from 0 by first occurrence.

  >>> pooled(np.array([7, 7, 5, 5, 7, 7]))
  array([0, 0, 1, 1, 0, 0], dtype=int32)
  """
  numbers = {}
  return np.array([numbers.setdefault(i, len(numbers)) for i in prompt_ids.tolist()], np.int32)


def replacements(useful: np.ndarray, fresh: np.ndarray) -> np.ndarray:
  """Which of the groups (old, then new) each place gets, i[N].

  Args:
    useful: bool[N], old groups that stay.
    fresh: bool[M], new groups that may take the place of others.
  """
  places, spare = np.flatnonzero(~useful), np.flatnonzero(fresh)
  source = np.arange(len(useful))
  source[places[: len(spare)]] = len(useful) + spare[: len(places)]
  return source


def replace_groups(
  old: tuple[Batch, Texts],
  new: tuple[Batch, Texts],
  useful: np.ndarray,
  rows_per_prompt: int,
  ignored: Collection[str] = (),
) -> tuple[Batch, Texts]:
  """Replaces groups of `old` that are not useful, bool[N], by groups of `new` that are `informative`."""
  source = replacements(useful, informative(*new, rows_per_prompt, ignored))
  return with_groups(old, new, source, rows_per_prompt)


def with_groups(
  old: tuple[Batch, Texts], new: tuple[Batch, Texts], source: np.ndarray, rows_per_prompt: int
) -> tuple[Batch, Texts]:
  """The groups at the places `source`, i[N], of the old ones and, behind them, the new ones."""
  rows = (source[:, None] * rows_per_prompt + np.arange(rows_per_prompt)[None, :]).reshape(-1)
  pick = lambda a, b: np.concatenate([a, b])[rows]
  # Groups are numbered by their places, because a new group may have the number of an old one.
  groups = np.repeat(np.arange(len(source), dtype=np.int32), rows_per_prompt)
  batch = jax.tree.map(pick, old[0], new[0]).replace(group_ids=groups)
  # Errors and messages of rows that were replaced are reported too.
  before, after = old[1].scores, new[1].scores
  scores = after._replace(
    total=pick(before.total, after.total),
    components=jax.tree.map(pick, before.components, after.components),
    valid=pick(before.valid, after.valid),
    errors=dict(collections.Counter(before.errors) + collections.Counter(after.errors)),
    messages=before.messages + after.messages,
  )
  known, records = len(old[1].completions), old[1].records + new[1].records
  text = lambda i: old[1].completions[i] if i < known else new[1].completions[i - known]
  episodes = [*old[1].episodes, *new[1].episodes]
  return batch, Texts(
    Lazy(len(rows), lambda place: text(rows[place])),
    [records[i] for i in source],
    scores,
    [episodes[i] for i in rows] if episodes else [],
  )


def demonstrated(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  prompt_length: int,
  max_new_tokens: int,
  cut: bool = False,
  field: str = 'answer',
) -> Batch:
  """Completions in the records as if they had been sampled with probability one: one row per record.

  As in a sampled row, the completion begins at `prompt_length` and includes the stop token. With `cut`,
  a longer prompt loses its beginning and a longer answer its end; that row counts as not `finished`.

  Raises:
    TooLong: without `cut`, a prompt of more than `prompt_length` or an answer of more than
      `max_new_tokens` tokens.
    ValueError: a record without the field.
  """
  for record in records:
    if field not in record:
      raise ValueError(f'record {record["id"]}: no {field!r} to demonstrate, only {sorted(record)}')
  prompts = batching.prompts(records, tokenizer, length=prompt_length, cut=cut)
  answers = [batching.completion(record, tokenizer, field) for record in records]
  tokens, made = _left_aligned(records, answers, tokenizer.pad_id, max_new_tokens, cut, field)
  seen = np.concatenate([prompts.mask, made], axis=1)
  return Batch(
    tokens=np.concatenate([prompts.tokens, tokens], axis=1),
    segment_ids=seen.astype(np.int32),
    mask=np.concatenate([np.zeros_like(prompts.mask), made], axis=1),
    behavior_logp=np.zeros(seen.shape, np.float32),
    finished=np.array([len(answer) <= max_new_tokens for answer in answers]),
    prompt_ids=prompts.ids,
    group_ids=np.arange(len(records), dtype=np.int32),
  )


def _left_aligned(
  records: Sequence[Mapping],
  answers: Sequence[list[int]],
  pad_id: int,
  width: int,
  cut: bool,
  field: str,
) -> tuple[np.ndarray, np.ndarray]:
  """The ids of the answers from column 0 on: i32[N, width], and their mask."""
  tokens = np.full((len(records), width), pad_id, np.int32)
  for i, (record, ids) in enumerate(zip(records, answers)):
    if len(ids) > width and not cut:
      raise batching.TooLong(
        f'record {record["id"]}: the {field} and its stop token are {len(ids)} tokens, '
        f'more than max_new_tokens {width}'
      )
    tokens[i, : len(ids)] = ids[:width]
  lengths = np.array([len(ids) for ids in answers])
  return tokens, np.arange(width)[None] < lengths[:, None]


def begun(record: Mapping, tokenizer: Tokenizer, given: Callable[[int], int], most: int) -> dict:
  """The record, with the first tokens of its answer as `begun` if some are given.

  Args:
    given: tokens of the answer without its stop token, at most `most` -> how many are given.
    most: largest number that there is room for.
  """
  ids = batching.completion(record, tokenizer)
  number = given(min(len(ids) - 1, most))
  return {**record, 'begun': ids[:number]} if number else dict(record)


def joined(groups: Any, rows: Any, prompts: int) -> Any:
  """Puts rows behind those of their prompt, in all arrays [B, ...] of two trees.

  Args:
    groups: of `prompts` groups.
    rows: the same number for each prompt.
  """

  def join(x, y):
    both = [z.reshape(prompts, -1, *z.shape[1:]) for z in (x, y)]
    return np.concatenate(both, axis=1).reshape(-1, *x.shape[1:])

  return jax.tree.map(join, groups, rows)


def joined_rows(groups: Sequence, rows: Sequence, prompts: int) -> list:
  """`joined` for lists with an entry for each row."""
  size, more = len(groups) // prompts, len(rows) // prompts
  cut = lambda x, n, group: list(x[group * n : (group + 1) * n])
  parts = [cut(groups, size, g) + cut(rows, more, g) for g in range(prompts)]
  return [row for part in parts for row in part]


def metrics(batch: Batch, scores: Scores, episodes: Sequence[Episode] = ()) -> dict[str, float]:
  """Rewards, lengths and failures of scored rows; of episodes, what `drawn.metrics` says as well."""
  valid, rewards = batch.valid, batch.rewards
  mean = lambda x: float(np.mean(x[valid])) if valid.any() else float('nan')
  _, group = np.unique(batch.group_ids, return_inverse=True)
  spread = [np.ptp(rewards[(group == g) & valid]) for g in set(group[valid])]
  return {
    'reward': mean(rewards),
    **{f'reward/{name}': mean(value) for name, value in scores.components.items()},
    'reward/same_in_group': float(np.mean(np.array(spread) == 0)) if spread else float('nan'),
    'length': float(batch.mask.sum(axis=1).mean()),
    'truncated': float(1 - batch.finished.mean()),
    **errors(scores),
    **(drawn.metrics(batch, episodes) if episodes else {}),
  }


def errors(scores: Scores) -> dict[str, float]:
  """Rows that failed, `verifier_errors`, and by kind: `verifier_errors/NAME/KIND`.

  With an environment there are `environment_errors` and `environment_errors/KIND` too.
  """
  found = {f'verifier_errors/{name}': float(n) for name, n in scores.errors.items()}
  found['verifier_errors'] = float(np.sum(~scores.valid))
  if 'environment' not in scores.components:
    return found
  own = {name: n for name, n in found.items() if name.startswith('verifier_errors/environment/')}
  by_kind = {f'environment_errors/{name.rpartition("/")[2]}': n for name, n in own.items()}
  others = {name: n for name, n in found.items() if name not in own}
  return others | by_kind | {'environment_errors': sum(own.values(), 0.0)}


def shown(batch: Batch, texts: Texts) -> Sequence[tuple[str, str, float]]:
  """The rows of a table of samples: prompt, completion or episode, reward (NaN where it failed)."""
  rows_per_prompt = len(texts.completions) // len(texts.records)

  def row(i: int) -> tuple[str, str, float]:
    said = drawn.transcript(texts.episodes[i]) if texts.episodes else texts.completions[i]
    reward = float(batch.rewards[i] if batch.valid[i] else np.nan)
    return question(texts.records[i // rows_per_prompt]), said, reward

  return Lazy(len(texts.completions), row)
