"""Environments: what answers the turns of the policy, such as a tool, a game or a teacher.

| module | what is inside |
|---|---|
| `base` | the interface: `Environment`, `Step`, and `Replies` between an environment and the sampler |
| `episodes` | the episodes of a rollout: asks the environment, keeps what was said and its rewards |
| `workers` | runs the calls of an environment in other processes, with limits, or in this one |
| `conversation` | observations as tokens, by the chat template |
| `guessing` | a number to be guessed: a small example |

Nothing here imports JAX, except `episodes` and `conversation`, which are imported one by one.
"""

from typing import Annotated

from polgrad.environments.base import Environment, Replies, Step
from polgrad.environments.guessing import Guess
from polgrad.registry import table

TABLE = table('environments', Guess)
Part = Annotated[Environment, TABLE]

__all__ = ['TABLE', 'Environment', 'Guess', 'Part', 'Replies', 'Step']
