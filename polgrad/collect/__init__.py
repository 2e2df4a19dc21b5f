"""Collectors: from data records to the batch of one training step.

| name | what it does |
|---|---|
| `Rollouts` | samples completions of prompts, scores and credits them |
| `Vines` | the same, and estimates the value of the state before each step by further completions |
| `Trees` | samples completions as trees, whose branches say how good their nodes are |
| `Branched` | samples episodes, some of which are copies of others up to a reply |
| `BestFirst` | searches for episodes with a reward, from the likeliest states |
| `Iterated` | rollouts, some of which improve an attempt of an earlier step |
| `Inpainted` | rollouts, of which wrong ones are replaced by some that began with a hint |
| `Restarts` | rollouts, some of which start from states of given answers |
| `Contrasted` | rollouts that are rewarded by the policy's own embeddings of related texts |
| `Unsolved` | rollouts, and the answers of prompts that none of them solved, for further updates |
| `Mixed` | rollouts, remembered rollouts or answers of the data, one kind a batch |
| `Hinted` | rollouts; a prompt without a right sample is asked again with its answer |
| `Quantiles` | rows of a pool of rollouts, each behind a label of its quantile of the reward |
| `Stored` | reads completions of prompts, and the teacher's log-probs of them, from files |
| `Explored` | rollouts, but draws them so that they cover the policy's distribution better |
| `Demonstrations` | reads prompts with their answers off the data |
| `EarlyTargets` | the same, with running means of what the policy predicted for their tokens |
| `MixedTargets` | the same of two networks that give each other targets; rows are mixed |
| `Preferences` | reads pairs of completions off the data |
| `UserPreferences` | reads pairs off the data, each beside other pairs of the same user |
| `SampledPreferences` | reads pairs off the data, each beside two samples of a policy |
| `Feedback` | reads completions with a label each off the data |
| `Revisions` | reads pairs off the data, and asks for each completion to be improved |
| `Lists` | reads several completions of a prompt, with their rewards, off the data |
| `Given` | the interface of those that read completions off the data |
| `Sampling` | the interface of those that sample |
| `Turns` | what settings of anything that samples say of environments |
| `Collector` | the interface of all of these; its fields are settings, `make` gives the function |
| `picks` | which of the sampled rows of a group are trained on, such as the best and the worst |
| `minibatches` | cuts a batch for several updates |

All make a `types.Batch`, so reinforcement, preference learning, distillation and supervised learning
share one loop. Batches are NumPy arrays on the host, because rewards, groups and credit concern the
whole batch: it is small next to the model, and every process sees all of it. Only model work is spread
over the mesh.
"""

from typing import Annotated

from polgrad.collect import picks
from polgrad.collect.base import Collected, Collector, Context, Sampling, minibatches
from polgrad.collect.best_first import BestFirst
from polgrad.collect.branched import Branched
from polgrad.collect.contrasted import Contrasted
from polgrad.collect.data import (
  Demonstrations,
  Feedback,
  Given,
  Lists,
  Preferences,
  Revisions,
  SampledPreferences,
  UserPreferences,
)
from polgrad.collect.drawn import Drawn, Turns, make_draws
from polgrad.collect.early import EarlyTargets
from polgrad.collect.exploration import Explored
from polgrad.collect.hinted import Hinted
from polgrad.collect.inpainted import Inpainted
from polgrad.collect.iterated import Iterated
from polgrad.collect.mixed import Mixed
from polgrad.collect.mixed_targets import MixedTargets
from polgrad.collect.quantiles import Quantiles
from polgrad.collect.restarts import Restarts
from polgrad.collect.rollouts import Rollouts
from polgrad.collect.scored import also_read, completions, question
from polgrad.collect.stored import Stored
from polgrad.collect.trees import Trees
from polgrad.collect.unsolved import Unsolved
from polgrad.collect.vines import Vines
from polgrad.registry import table

__all__ = [
  'TABLE',
  'BestFirst',
  'Branched',
  'Collected',
  'Collector',
  'Context',
  'Contrasted',
  'Demonstrations',
  'Drawn',
  'EarlyTargets',
  'Explored',
  'Feedback',
  'Given',
  'Hinted',
  'Inpainted',
  'Iterated',
  'Lists',
  'Mixed',
  'MixedTargets',
  'Part',
  'Preferences',
  'Quantiles',
  'Restarts',
  'Revisions',
  'Rollouts',
  'SampledPreferences',
  'Sampling',
  'Stored',
  'Trees',
  'Turns',
  'Unsolved',
  'UserPreferences',
  'Vines',
  'also_read',
  'completions',
  'make_draws',
  'minibatches',
  'picks',
  'question',
]

TABLE = table(
  'collect',
  Rollouts,
  Vines,
  Trees,
  Branched,
  BestFirst,
  Contrasted,
  Explored,
  Iterated,
  Inpainted,
  Restarts,
  Mixed,
  Hinted,
  Quantiles,
  Stored,
  Unsolved,
  Demonstrations,
  EarlyTargets,
  MixedTargets,
  Preferences,
  Revisions,
  UserPreferences,
  SampledPreferences,
  Feedback,
  Lists,
)
Part = Annotated[Collector, TABLE]
