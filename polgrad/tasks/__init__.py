"""Tasks by name: what to learn, how it is judged, and sensible sizes of batches.

| task | what it is |
|---|---|
| `addition` | sums of two numbers, for small models that are trained from scratch |
| `mixed_sums` | sums of numbers of different lengths, which are their categories |
| `worked_sums` | sums with or without the work before them: accuracy against length |
| `same_sums` | sums with others of the same and of another result, for embeddings |
| `choices` | sums with four choices, answered by a letter |
| `tastes` | preference pairs of users with opposite tastes, for reward models |
| `calculator` | word problems with large numbers, and a calculator to call |
| `guess` | a number that is guessed in several turns |
| `nim` | a game of two players, in self-play |
| `textarena` | a game of the package textarena by name |
| `verifiers` | an environment of the package verifiers |
| `chain_sum` | sums and differences as questions in words |
| `reasoning_gym` | any task of reasoning-gym by name |
| `jsonl` | your own file: problems, pairs, demonstrations or conversations |
| `hub` | a data set of the hub by name, a folder, or a file of parquet, JSON, JSON lines or CSV |
| `gsm8k` | word problems whose answers end with `#### 72`, from the hub, a folder or a file |
| `math` | problems whose solutions have a `\\boxed{}` answer, from the hub, a folder or a file |
| `tfds` | a TensorFlow Datasets folder |

Each is a function that returns a `Task`. `polgrad.compose` joins it with a method and a model.
"""

from polgrad.tasks.adapters import textarena, verifiers
from polgrad.tasks.addition import addition
from polgrad.tasks.base import Task
from polgrad.tasks.calculator import calculator
from polgrad.tasks.choices import choices
from polgrad.tasks.files import gsm8k, hub, jsonl, math, tfds
from polgrad.tasks.guess import guess
from polgrad.tasks.mixed_sums import mixed_sums
from polgrad.tasks.nim import nim
from polgrad.tasks.reasoning_gym import chain_sum, gym_names, gym_settings, reasoning_gym
from polgrad.tasks.same_sums import same_sums
from polgrad.tasks.tastes import tastes
from polgrad.tasks.worked_sums import worked_sums

FUNCTIONS = (
  addition,
  mixed_sums,
  worked_sums,
  same_sums,
  choices,
  tastes,
  calculator,
  guess,
  nim,
  textarena,
  verifiers,
  chain_sum,
  reasoning_gym,
  jsonl,
  hub,
  gsm8k,
  math,
  tfds,
)
TABLE = {fn.__name__: fn for fn in FUNCTIONS}

__all__ = [
  'TABLE',
  'Task',
  'addition',
  'calculator',
  'chain_sum',
  'choices',
  'gsm8k',
  'guess',
  'gym_names',
  'gym_settings',
  'hub',
  'jsonl',
  'math',
  'mixed_sums',
  'nim',
  'reasoning_gym',
  'same_sums',
  'tastes',
  'textarena',
  'tfds',
  'verifiers',
  'worked_sums',
]
