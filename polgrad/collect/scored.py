"""Rollouts with their rewards, on the host: texts, groups, demonstrations, what to report."""

import collections
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from polgrad.collect.base import Context
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.rewards.scoring import Scores
from polgrad.types import Rollout, Scored


class Judged(NamedTuple):
  """A rollout with its rewards, texts and data rows."""

  scored: Scored  # NumPy
  scores: Scores
  texts: list[str]  # [B]
  records: list[dict]  # [N]


def question(record: Mapping) -> str:
  """What a table of samples shows of a record."""
  return record['prompt'] if 'prompt' in record else record['messages'][-1]['content']


def completions(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
  """The text of each row's completion, without the stop token that ended it."""
  texts = []
  for tokens, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished):
    ids = [int(i) for i in tokens[mask]]
    texts.append(tokenizer.decode(ids[:-1] if finished else ids))
  return texts


def score_rollout(rollout: Rollout, records: Sequence[dict], context: Context) -> Judged:
  """Decodes and scores a rollout on the host; each process judges its share of the rows."""
  texts = completions(rollout, context.tokenizer)
  lengths = rollout.mask.sum(axis=1)
  rows_per_prompt = len(texts) // len(records)
  processes, own = jax.process_count(), jax.process_index()
  rows = range(own, len(texts), processes)
  scores = context.score(
    [texts[i] for i in rows],
    [records[i // rows_per_prompt] for i in rows],
    [int(lengths[i]) for i in rows],
  )
  if processes > 1:
    scores = _gather_scores(scores, len(texts))
  scored = Scored(
    rewards=np.where(scores.valid, scores.total, 0.0).astype(np.float32),
    valid=scores.valid,
    **{name: getattr(rollout, name) for name in Rollout.__dataclass_fields__},
  )
  return Judged(scored, scores, texts, list(records))


def _gather_scores(scores: Scores, rows: int) -> Scores:
  """Interleaves the processes' shares; error counts and messages stay those of this process."""
  processes = jax.process_count()
  share = -(-rows // processes)

  def gather(x: np.ndarray) -> np.ndarray:
    padded = np.zeros(share, np.float64)
    padded[: len(x)] = x
    return multihost_utils.process_allgather(padded).T.reshape(-1)[:rows]

  return scores._replace(
    total=gather(scores.total),
    components={k: gather(v) for k, v in sorted(scores.components.items())},
    valid=gather(scores.valid) > 0,
  )


def distinct(ids: np.ndarray) -> np.ndarray:
  """Ids for sampling keys: a prompt that stands twice in a batch must not draw the same noise."""
  seen = collections.Counter()
  out = []
  for i in ids.tolist():
    out.append((i + seen[i] * 0x9E3779B1) % 2**31)  # a step far beyond any data set's rows
    seen[i] += 1
  return np.asarray(out, np.int32)


def informative(scored: Scored, rows_per_prompt: int) -> np.ndarray:
  """bool[N]: groups whose rewards are not all equal, so that a group baseline leaves something."""
  rewards = np.where(scored.valid, scored.rewards, np.nan).reshape(-1, rows_per_prompt)
  with warnings.catch_warnings(action='ignore', category=RuntimeWarning):  # a group of failures
    return np.nanmax(rewards, axis=1) > np.nanmin(rewards, axis=1)


def replace_groups(old: Judged, new: Judged, useful: np.ndarray, rows_per_prompt: int) -> Judged:
  """Puts informative groups of `new` in the place of uninformative ones of `old`."""
  places = np.flatnonzero(~useful)
  spare = np.flatnonzero(informative(new.scored, rows_per_prompt))
  source = np.arange(len(useful))
  source[places[: len(spare)]] = len(useful) + spare[: len(places)]
  rows = (source[:, None] * rows_per_prompt + np.arange(rows_per_prompt)[None, :]).reshape(-1)
  pick = lambda a, b: np.concatenate([a, b])[rows]
  scored = jax.tree.map(pick, old.scored, new.scored)
  names = np.repeat(np.arange(len(useful), dtype=np.int32), rows_per_prompt)
  scores = new.scores._replace(
    total=pick(old.scores.total, new.scores.total),
    components=jax.tree.map(pick, old.scores.components, new.scores.components),
    valid=pick(old.scores.valid, new.scores.valid),
    errors=dict(collections.Counter(old.scores.errors) + collections.Counter(new.scores.errors)),
    messages=old.scores.messages + new.scores.messages,
  )
  texts, records = old.texts + new.texts, old.records + new.records
  return Judged(
    scored=scored.replace(group_ids=names),
    scores=scores,
    texts=[texts[i] for i in rows],
    records=[records[i] for i in source],
  )


def demonstrated(
  records: Sequence[Mapping],
  tokenizer: Tokenizer,
  *,
  prompt_length: int,
  max_new_tokens: int,
  policy_step: int,
) -> Rollout:
  """The records' answers as if they had been sampled with probability one: one row a record.

  Laid out as the sampler does: the completion, stop token included, begins at `prompt_length`.

  Raises:
    ValueError: a record without `answer`, or with one of more than `max_new_tokens` tokens.
  """
  for record in records:
    if 'answer' not in record:
      raise ValueError(f"record {record['id']}: no 'answer' to demonstrate, only {sorted(record)}")
  prompts = batching.prompts(records, tokenizer, length=prompt_length)
  answered = batching.supervised(records, tokenizer, length=prompt_length + max_new_tokens)
  tokens = np.full((len(records), max_new_tokens), tokenizer.pad_id, np.int32)
  lengths = answered.mask.sum(axis=1)
  for i, (record, length) in enumerate(zip(records, lengths)):
    if length > max_new_tokens:
      raise ValueError(
        f'record {record["id"]}: the answer and its stop token are {length} tokens, '
        f'more than max_new_tokens {max_new_tokens}'
      )
    tokens[i, :length] = answered.tokens[i][answered.mask[i]]
  made = np.arange(max_new_tokens)[None] < lengths[:, None]
  seen = np.concatenate([prompts.mask, made], axis=1)
  return Rollout(
    tokens=np.concatenate([prompts.tokens, tokens], axis=1),
    segment_ids=seen.astype(np.int32),
    mask=np.concatenate([np.zeros_like(prompts.mask), made], axis=1),
    behavior_logp=np.zeros(seen.shape, np.float32),
    finished=np.ones(len(records), bool),
    prompt_ids=prompts.ids,
    group_ids=np.arange(len(records), dtype=np.int32),
    policy_step=np.full(len(records), policy_step, np.int32),
  )


def metrics(judged: Judged) -> dict[str, float]:
  """Rewards, lengths and failures of a rollout."""
  scored, scores = judged.scored, judged.scores
  valid = scored.valid
  mean = lambda x: float(np.mean(x[valid])) if valid.any() else float('nan')
  rewards = scored.rewards
  _, group = np.unique(scored.group_ids, return_inverse=True)
  spread = [np.ptp(rewards[(group == g) & valid]) for g in set(group[valid])]
  return {
    'reward': mean(rewards),
    **{f'reward/{name}': mean(value) for name, value in scores.components.items()},
    'reward/same_in_group': float(np.mean(np.array(spread) == 0)) if spread else float('nan'),
    'length': float(scored.mask.sum(axis=1).mean()),
    'truncated': float(1 - scored.finished.mean()),
    'verifier_errors': float(len(valid) - valid.sum()),
    **{f'verifier_errors/{name}': float(n) for name, n in scores.errors.items()},
  }
