"""Environments: what answers the turns of the policy, such as a tool, a game or a teacher.

| module | what is inside |
|---|---|
| `base` | the interface: `Environment`, `Step`, and `Replies` between an environment and the sampler |
| `episodes` | the episodes of a rollout: asks the environment, keeps what was said and its rewards |
| `workers` | runs the calls of an environment in other processes, with limits, or in this one |
| `conversation` | observations as tokens, by the chat template |
| `one_turn` | what ordinary tasks have: an episode of one turn |
| `guessing` | a number to be guessed: a small example |
| `nim` | a game of two players, for self-play |
| `attempts` | several attempts at one problem, judged by a verifier |
| `tools` | the policy calls tools before it answers |
| `toolbox` | tools: a calculator, a search in texts, Python in a sandbox |
| `calls` | tool calls in what a model says |
| `schemas` | descriptions of tools for chat templates |
| `sandbox` | runs a Python program that nobody has read |
| `adapters` | environments of the packages textarena and verifiers |

Nothing here imports JAX, except `episodes` and `conversation`, which are imported one by one.
"""

from typing import Annotated

from polgrad.environments.adapters.textarena import TextArena
from polgrad.environments.adapters.verifiers import Verifiers
from polgrad.environments.attempts import Attempts
from polgrad.environments.base import Environment, Replies, Step
from polgrad.environments.guessing import Guess
from polgrad.environments.nim import Nim
from polgrad.environments.one_turn import OneTurn
from polgrad.environments.tools import Tools, calculator, python, search
from polgrad.registry import table

TABLE = table(
  'environments',
  Attempts,
  Guess,
  Nim,
  OneTurn,
  TextArena,
  Tools,
  Verifiers,
  calculator,
  python,
  search,
)
Part = Annotated[Environment, TABLE]

__all__ = [
  'TABLE',
  'Attempts',
  'Environment',
  'Guess',
  'Nim',
  'OneTurn',
  'Part',
  'Replies',
  'Step',
  'TextArena',
  'Tools',
  'Verifiers',
  'calculator',
  'python',
  'search',
]
