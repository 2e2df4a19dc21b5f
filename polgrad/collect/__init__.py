"""Collectors: from data records to the batch of one training step.

`rollouts` (or `explored`, which draws them another way) samples, scores and credits;
`demonstrations` and `preferences` read completions off the data. All end in the same `Batch`, so
reinforcement, preference learning, distillation and supervised learning share one loop.

Batches live on the host, as NumPy: rewards, groups and credit belong to the whole rollout, which is
small next to the model, and every process sees all of it. Only model work is spread over the mesh.
"""

from typing import Annotated

from polgrad.collect.base import Collected, Collector, Context, minibatches
from polgrad.collect.data import demonstrations, preferences
from polgrad.collect.exploration import explored
from polgrad.collect.rollouts import rollouts
from polgrad.collect.scored import completions, question
from polgrad.registry import table

__all__ = [
  'TABLE',
  'Collected',
  'Collector',
  'Context',
  'Part',
  'completions',
  'demonstrations',
  'explored',
  'minibatches',
  'preferences',
  'question',
  'rollouts',
]

TABLE = table('collect', rollouts, explored, demonstrations, preferences)
Part = Annotated[Collector, TABLE]
