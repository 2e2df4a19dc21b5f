"""Batches of one kind each: samples of the policy, samples that it made before, or given completions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from polgrad.collect import replay as replays
from polgrad.collect.base import Collect, Context, Draw
from polgrad.collect.drawn import Drawn
from polgrad.collect.rollout_steps import RolloutSteps
from polgrad.collect.rollouts import OTHER_ROWS, Rollouts
from polgrad.registry import Count, Fraction
from polgrad.sharding import to_host
from polgrad.types import Batch, TrainState

FRESH, REMEMBERED, GIVEN = 'fresh', 'remembered', 'given'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(Rollouts):
  """Samples completions, takes them from its memory, or reads the record's `answer`: one kind a batch.

  For distillation: nothing is sampled for a batch of the other kinds. With r uniform in [0, 1) and h the
  student's fraction in a step, its batch is

      sampled       if r < h (1 - step / fade), or if r < h and the memory is not full
      remembered    if r < h otherwise: random rows of the last `memory` sampled batches
      given         if r >= h: the answers of the records

  GKD (arXiv:2306.13649) has a constant h and no memory. DistiLLM (arXiv:2402.03898) has a growing h and
  a memory, so that few batches need the sampler near the end.
  """

  # h at the first step.
  student_fraction: Fraction = 0.5
  # What is added to h after every `rise_every` steps, up to h = 1; 0 steps: h is constant.
  rise: Fraction = 0.1
  rise_every: Count = 0
  # Steps after which no batch is sampled any more, if the memory is full; 0: sampling does not fade.
  fade: Count = 0
  # Sampled batches that are remembered; 0: every batch of the student is sampled.
  memory: Count = 0

  def __post_init__(self):
    super().__post_init__()
    names = (*OTHER_ROWS, 'max_resamples', 'samples_per_prompt')
    self.refuse('a batch has one row a prompt and one kind of rows', *names)
    if self.fade and not self.memory:
      raise ValueError(f'Mixed: fade={self.fade} needs a memory, from which later batches come')

  @property
  def fields(self) -> tuple[str, ...]:
    return ('answer',)

  def init(self) -> replays.Ring | tuple:
    return replays.empty(self._blank(), capacity=self.memory) if self.memory else ()

  def kind(self, seed: int, step: int, stored: int) -> str:
    """The kind of the batch of a step: 'fresh', 'remembered' or 'given'.

    Args:
      seed: of the phase.
      step: batches that the phase collected before.
      stored: batches that were put into the memory before.
    """
    drawn = np.random.default_rng((seed, step, 5)).random()
    climbed = step // self.rise_every if self.rise_every else 0
    student = min(self.student_fraction + self.rise * climbed, 1.0)
    if drawn >= student:
      return GIVEN
    fading = max(1 - step / self.fade, 0.0) if self.fade else 1.0
    fresh = not self.memory or stored < self.memory or drawn < student * fading
    return FRESH if fresh else REMEMBERED

  def make(self, context: Context) -> Collect:
    return MixedSteps(**self._parts(self.within(context))).collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedSteps(RolloutSteps):
  """The steps of `Mixed`."""

  settings: Mixed

  def _kind(self, step: int, memory: Any) -> str:
    stored = int(memory.count) if memory else 0
    return self.settings.kind(self.context.seed, step, stored)

  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    if self._kind(step, to_host(state.collect_state)) == FRESH:
      return super().sample(state, draw, step)
    # Remembered rows take the places of these in `exchange`.
    records, settings = draw(self.settings.prompts), self.settings
    tokenizer, cut = self.context.tokenizer, settings.cut
    return Drawn(settings.demonstrated(records, tokenizer, 'answer', cut=cut)), records

  def exchange(self, batch: Batch, memory: Any, random: np.random.Generator) -> tuple[Batch, Any]:
    kind = self._kind(int(batch.sampled_at[0]), memory)
    if kind == FRESH and memory:
      return batch, replays.stored(memory, batch)
    if kind != REMEMBERED:
      return batch, memory
    rows = replays.drawn_rows(memory, len(batch.tokens), random)
    return rows.replace(group_ids=batch.group_ids), memory
