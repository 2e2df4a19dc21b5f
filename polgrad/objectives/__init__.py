"""Objectives: what the optimizer minimises, as a few families with slots for functions.

| class | loss |
|---|---|
| `PolicyGradient` | surrogates of log-ratios and advantages, weights and penalties |
| `Pairwise` | a function of the score difference of two rows (DPO and its kin) |
| `RewardModel` | the same, of the scores of a scalar head, with penalties on these |
| `Pointwise` | a function of the score of one row |
| `Listwise` | a function of the scores of all rows of a prompt |
| `Regression` | the squared error of rewards, scores and an estimate of log Z |
| `PrefixValues` | the squared error of values of prefixes, which steer decoding |
| `Distillation` | a divergence from a teacher's next-token distribution |
| `Supervised` | the negative log-likelihood of given completions |
| `WeightedSum` | a weighted sum of these |

`Objective` is their base class, `Head` that of further layers of a reward model, and `networks.Network`
that of small networks that learn beside the model, by another loss. An objective never
sees the model: it declares what it reads (`requires`, `stats`, `head`), gets the model's outputs, and
returns named terms as undivided means. Totals and counts add up, so any split of a batch into
micro-batches or over devices gives the same value and gradient once totals are divided by the counts of
the whole batch.

A function in a slot reads the arrays that its positional arguments name; `view` lists all names.
"""

from typing import Annotated

from polgrad.objectives.base import Objective, check_reads, view
from polgrad.objectives.heads import Head
from polgrad.objectives.likelihood import Distillation, Supervised
from polgrad.objectives.policy_gradient import PolicyGradient
from polgrad.objectives.prefix_scorer import PrefixValues
from polgrad.objectives.reward_model import RewardModel
from polgrad.objectives.row_level import Listwise, Pointwise
from polgrad.objectives.sequence_level import Pairwise, Regression
from polgrad.objectives.weighted_sum import FAMILIES, WeightedSum
from polgrad.registry import table

TABLE = FAMILIES | table('objectives', WeightedSum)
Part = Annotated[Objective, TABLE]

__all__ = [
  'FAMILIES',
  'TABLE',
  'Distillation',
  'Head',
  'Listwise',
  'Objective',
  'Pairwise',
  'Part',
  'Pointwise',
  'PolicyGradient',
  'PrefixValues',
  'Regression',
  'RewardModel',
  'Supervised',
  'WeightedSum',
  'check_reads',
  'view',
]
