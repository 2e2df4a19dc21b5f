"""Rollouts that are rewarded by what they do to the embedding of a text (GRACE, arXiv:2510.04506).

A record has a text (`prompt`), another one that should be close to it (`query`) and some that should
not (`negatives`). The policy writes a rationale for each of them. The embedding of a text is the mean
state of the policy over the text and its rationale, and a rationale of the prompt is rewarded if its
embedding is close to that of the query.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np

from polgrad import sharding
from polgrad.collect.base import Collect, Context, Draw
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import Rollouts
from polgrad.collect.row_sampler import RowSampler, make_row_sampler
from polgrad.collect.scored import Texts
from polgrad.compiling import jit
from polgrad.data import batching
from polgrad.losses import embedding_rewards
from polgrad.models.policy import Policy
from polgrad.registry import AtLeastOne, Count, table
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Params, Prompts, TrainState

Part = Annotated[Callable, table('embedding_rewards', embedding_rewards.contrastive)]
TERM = 'contrast'  # name of the reward among its terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrasted(Rollouts):
  """Rollouts with a reward of embeddings, which is added to those of verifiers (arXiv:2510.04506).

  For every record the policy also answers the `query` and the first `negatives` texts in the place of
  the prompt. Their rows are not trained on. The embeddings are those of the policy that sampled,
  without a gradient. What a chat template writes before a text, such as the system turn, is left out.
  """

  judges: ClassVar[bool] = True
  # The reward of the embeddings of a batch, see `embedding_rewards`.
  contrast: Part = embedding_rewards.contrastive
  # Texts of `negatives` that are answered, the first ones of each record.
  negatives: AtLeastOne = 1
  # Answers to the query and to each negative. Row i of a group is compared with number i modulo this;
  # 0: as many as the group has rows.
  partner_samples: Count = 1

  def __post_init__(self):
    super().__post_init__()
    names = ('max_resamples', 'demonstrations', 'preferences', 'opponents', 'others', 'beginning')
    names += ('baseline_samples', 'choose', 'environment')
    self.refuse('the reward compares the samples of a whole batch', *names)
    if self.samples_per_prompt % max(self.partner_samples, 1):
      raise ValueError(
        f'Contrasted: samples_per_prompt={self.samples_per_prompt} is no multiple of '
        f'partner_samples={self.partner_samples}'
      )

  @property
  def earned(self) -> frozenset[str]:
    return frozenset({TERM})

  @property
  def partners(self) -> int:
    """Answers to a text that is not trained on."""
    return self.partner_samples or self.samples_per_prompt

  def related(self, records: Sequence[Mapping]) -> list[dict]:
    """The queries of the records, then their first negatives, then their second ones, ...

    Raises:
      ValueError: a record without a query, or with too few negatives.
    """
    texts = [_texts(record, self.negatives) for record in records]
    return [
      batching.asking(record, own[i])
      for i in range(1 + self.negatives)
      for record, own in zip(records, texts, strict=True)
    ]

  def lay_out(self, records: Sequence[dict], *, tokenizer, cut: bool = False) -> Prompts:
    super().lay_out(
      self.related(records), tokenizer=tokenizer, cut=cut
    )  # refuses what does not fit
    return super().lay_out(records, tokenizer=tokenizer, cut=cut)

  def make(self, context: Context) -> Collect:
    context = self.within(context)
    # A seed that no phase has: others must not draw the noise of what they are compared with.
    other = context._replace(seed=~context.seed)
    return ContrastedSteps(
      **self._parts(context),
      draw_others=make_row_sampler(self, other, self.partners),
      contrast=jit(self.contrast),
      embed=jit(functools.partial(embedded, context.policy)),
    ).collect


def _texts(record: Mapping, negatives: int) -> list[str]:
  """The query and the first negatives of a record."""
  query, others = record.get('query'), record.get('negatives')
  where = f'record {record.get("id")}'
  if not isinstance(query, str):
    raise ValueError(f'{where}: query must be a text, got {query!r:.60}')
  texts = isinstance(others, list) and all(isinstance(text, str) for text in others)
  if not texts or len(others) < negatives:
    raise ValueError(
      f'{where}: negatives must be a list of {negatives} or more texts, got {others!r:.60}'
    )
  return [query, *others[:negatives]]


def embedded(
  policy: Policy, params: Params, tokens: Array, segment_ids: Array, mask: Array
) -> Array:
  """The mean states f32[B, D], of length 1, of tokens i32[B, T] over a mask bool[B, T]."""
  return embedding_rewards.mean_pooled(policy.hidden(params, tokens, segment_ids), mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastedSteps(RolloutSteps):
  """The steps of `Contrasted`: with the rows of the prompts, those of the other texts are sampled."""

  settings: Contrasted
  draw_others: RowSampler
  contrast: Callable[..., Array]  # compiled: the reward
  embed: Callable[..., Array]  # compiled: params, tokens, segment ids, mask -> embeddings

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    settings = self.settings
    rows, records = super().sample(state, draw, step)
    others = settings.related(records)
    beside = self._draw(self.draw_others, state, others, step)
    # [texts, prompts, samples, D]
    found = self._embeddings(state, beside.batch, others).reshape(
      1 + settings.negatives, len(records), settings.partners, -1
    )
    repeats = settings.samples_per_prompt // settings.partners
    spread = np.tile(found, (1, 1, repeats, 1)).reshape(1 + settings.negatives, -1, found.shape[-1])
    batch = rows.batch
    reward = self.contrast(
      spread[0],
      self._embeddings(state, batch, records),
      np.swapaxes(spread[1:], 0, 1),
      batch.group_ids,
      np.ones(len(batch.tokens), bool),
    )
    return rows._replace(batch=batch.with_arrays(**{TERM: to_host(reward)})), records

  def _embeddings(self, state: TrainState, batch: Batch, records: Sequence[dict]) -> np.ndarray:
    """The embeddings of rows, f32[B, D]; the rows of a record are consecutive."""
    context, each = self.context, len(batch.tokens) // len(records)
    headers = [batching.header(record, context.tokenizer) for record in records]
    there = batch.segment_ids > 0
    inside = there & (np.cumsum(there, axis=1) > np.repeat(headers, each)[:, None])
    devices = sharding.data_parallel_size(context.mesh)
    parts = context.micro_batches if len(there) % (context.micro_batches * devices) == 0 else 1
    found = []
    for rows in np.split(np.arange(len(there)), parts):
      own = batch.tokens[rows], batch.segment_ids[rows], inside[rows]
      found.append(to_host(self.embed(state.params, *sharding.place_batch(context.mesh, own))))
    return np.concatenate(found)

  def _judge(self, rows: Drawn, records: Sequence[dict]) -> tuple[Batch, Texts]:
    """Rows with the rewards of verifiers and of embeddings, or `unfinished_reward` in their place."""
    features = dict(rows.batch.features)
    contrast = features.pop(TERM)
    batch, texts = self._scored(Drawn(rows.batch.replace(features=features)), records)
    rewards = np.where(batch.valid, batch.rewards + contrast, 0)
    other = self.settings.unfinished_reward
    if math.isfinite(other):
      rewards = np.where(batch.finished | ~batch.valid, rewards, other)
    scores = texts.scores
    scores = scores._replace(
      components={**scores.components, TERM: contrast.astype(np.float64)},
      total=scores.total + contrast,
    )
    return batch.replace(rewards=rewards.astype(np.float32)), texts._replace(scores=scores)
