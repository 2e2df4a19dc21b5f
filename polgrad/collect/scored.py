"""Scores sampled rows on the host: texts, rewards, groups, demonstrations, what to report."""

import collections
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from polgrad.collect.base import Context
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.rewards.scoring import Scores
from polgrad.sampling import stopping
from polgrad.types import Batch


class Texts(NamedTuple):
  """What the host knows of scored rows besides their `Batch`."""

  completions: list[str]  # [B], decoded
  records: list[dict]  # [N], data records of the prompts
  scores: Scores  # of the completions, by term, with errors and messages


def question(record: Mapping) -> str:
  """What a table of samples shows of a record."""
  return record['prompt'] if 'prompt' in record else record['messages'][-1]['content']


def completions(batch: Batch, records: Sequence[Mapping], tokenizer: Tokenizer) -> list[str]:
  """The text of each row's completion, without the stop token that ended it.

  It is the whole assistant turn: what the prompt has written of it, such as `<think>` by the chat
  template or the `prefix`, comes first. Of special tokens only stop, pad and bos tokens are left out. It
  ends with the first stop string that was sampled, if any: what the last token adds behind that is left
  out.

  Args:
    records: of the prompts, in the order of the rows; each has the same number of rows.
  """
  rows_per_prompt = len(batch.tokens) // len(records)
  texts = []
  for i, (tokens, mask, finished) in enumerate(zip(batch.tokens, batch.mask, batch.finished)):
    opened = batching.opening(records[i // rows_per_prompt], tokenizer)
    ids = [int(i) for i in tokens[mask]]
    stopped = finished and ids[-1] in tokenizer.stop_ids
    text = tokenizer.decode(ids[:-1] if stopped else ids)
    texts.append(opened + stopping.through(text, tokenizer.stop_strings))
  return texts


def score_rows(batch: Batch, records: Sequence[dict], context: Context) -> tuple[Batch, Texts]:
  """Decodes sampled rows (NumPy) and fills in `rewards` and `valid`."""
  texts = completions(batch, records, context.tokenizer)
  lengths = batch.mask.sum(axis=1)
  rows_per_prompt = len(texts) // len(records)
  # Each process verifies every n-th row, and gets the scores of all.
  processes, own = jax.process_count(), jax.process_index()
  rows = range(own, len(texts), processes)
  scores = context.score(
    [texts[i] for i in rows],
    [records[i // rows_per_prompt] for i in rows],
    [int(lengths[i]) for i in rows],
    also_read(batch, rows, [records[i // rows_per_prompt] for i in rows], context.tokenizer),
  )
  if processes > 1:
    scores = _gather_scores(scores, len(texts))
  rewards = np.where(scores.valid, scores.total, 0.0).astype(np.float32)
  return batch.replace(rewards=rewards, valid=scores.valid), Texts(texts, list(records), scores)


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


def _gather_scores(scores: Scores, rows: int) -> Scores:
  """Interleaves the rows of all processes; errors and messages remain those of this process."""
  processes = jax.process_count()
  rows_each = -(-rows // processes)  # rounded up, because all processes must gather equal shapes

  def gather(x: np.ndarray) -> np.ndarray:
    padded = np.zeros(rows_each, np.float64)
    padded[: len(x)] = x
    return multihost_utils.process_allgather(padded).T.reshape(-1)[:rows]

  return scores._replace(
    total=gather(scores.total),
    components={k: gather(v) for k, v in sorted(scores.components.items())},
    valid=gather(scores.valid) > 0,
  )


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


def replace_groups(
  old: tuple[Batch, Texts],
  new: tuple[Batch, Texts],
  useful: np.ndarray,
  rows_per_prompt: int,
  ignored: Collection[str] = (),
) -> tuple[Batch, Texts]:
  """Replaces groups of `old` that are not useful, bool[N], by groups of `new` that are `informative`."""
  # Which group of (old, then new) each place gets, and which rows these groups have.
  places = np.flatnonzero(~useful)
  spare = np.flatnonzero(informative(*new, rows_per_prompt, ignored))
  source = np.arange(len(useful))
  source[places[: len(spare)]] = len(useful) + spare[: len(places)]
  rows = (source[:, None] * rows_per_prompt + np.arange(rows_per_prompt)[None, :]).reshape(-1)
  pick = lambda a, b: np.concatenate([a, b])[rows]
  # Groups are numbered by their places, because a new group may have the number of an old one.
  groups = np.repeat(np.arange(len(useful), dtype=np.int32), rows_per_prompt)
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
  texts, records = old[1].completions + new[1].completions, old[1].records + new[1].records
  return batch, Texts([texts[i] for i in rows], [records[i] for i in source], scores)


def demonstrated(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  prompt_length: int,
  max_new_tokens: int,
  cut: bool = False,
) -> Batch:
  """The records' answers as if they had been sampled with probability one: one row per record.

  As in a sampled row, the completion begins at `prompt_length` and includes the stop token. With `cut`,
  a longer prompt loses its beginning and a longer answer its end; that row counts as not `finished`.

  Raises:
    TooLong: without `cut`, a prompt of more than `prompt_length` or an answer of more than
      `max_new_tokens` tokens.
    ValueError: a record without `answer`.
  """
  for record in records:
    if 'answer' not in record:
      raise ValueError(f"record {record['id']}: no 'answer' to demonstrate, only {sorted(record)}")
  prompts = batching.prompts(records, tokenizer, length=prompt_length, cut=cut)
  answers = [batching.completion(record, tokenizer) for record in records]
  tokens, made = _left_aligned(records, answers, tokenizer.pad_id, max_new_tokens, cut)
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
  records: Sequence[Mapping], answers: Sequence[list[int]], pad_id: int, width: int, cut: bool
) -> tuple[np.ndarray, np.ndarray]:
  """The ids of the answers from column 0 on: i32[N, width], and their mask."""
  tokens = np.full((len(records), width), pad_id, np.int32)
  for i, (record, ids) in enumerate(zip(records, answers)):
    if len(ids) > width and not cut:
      raise batching.TooLong(
        f'record {record["id"]}: the answer and its stop token are {len(ids)} tokens, '
        f'more than max_new_tokens {width}'
      )
    tokens[i, : len(ids)] = ids[:width]
  lengths = np.array([len(ids) for ids in answers])
  return tokens, np.arange(width)[None] < lengths[:, None]


def metrics(batch: Batch, scores: Scores) -> dict[str, float]:
  """Rewards, lengths and failures of scored rows."""
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
    'verifier_errors': float(len(valid) - valid.sum()),
    **{f'verifier_errors/{name}': float(n) for name, n in scores.errors.items()},
  }


def shown(batch: Batch, texts: Texts) -> list[tuple[str, str, float]]:
  """The rows of a table of samples: prompt, completion, reward (NaN where a verifier failed)."""
  rows_per_prompt = len(texts.completions) // len(texts.records)
  return [
    (
      question(texts.records[i // rows_per_prompt]),
      text,
      float(batch.rewards[i] if batch.valid[i] else np.nan),
    )
    for i, text in enumerate(texts.completions)
  ]
