"""Several attempts at one problem: wrong answers are sent back, or every answer is."""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import NamedTuple

from polgrad.environments.base import Environment, Step
from polgrad.registry import AtLeastOne, Fraction, call, inputs, unbound
from polgrad.rewards import verifiers

REWARDS = ('last', 'every')
READABLE = ('completion', 'record')


class Tried(NamedTuple):
  """What is known of an episode."""

  record: Mapping
  attempts: int  # that were made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempts(Environment):
  """The policy answers, reads whether it was right, and tries again, `max_turns` times in all.

  A verifier of single completions judges each attempt. With `until_right` the episode ends at the first
  score of at least `right`; without it every episode has `max_turns` attempts, and the policy is not
  told which were right, as in SCoRe (arXiv:2409.12917).

  Metrics: `score` of every attempt, and `first_score`, in the first one.

  Attributes:
    verifier: judges an attempt; it may read `completion` and `record`.
    feedback: what the policy reads after an attempt that does not end the episode. `{score}` is replaced
      by its score, with two digits behind the point.
    until_right: whether a right attempt ends the episode.
    right: least score of a right attempt.
    rewarded: 'last': the last attempt alone has a reward, its score; 'every': each has its own.
    discount: the reward of attempt t, from 0, is score * discount**t; in [0, 1]. The turn-level retry of
      AReaL does the same.
  """

  verifier: verifiers.Part
  max_turns: AtLeastOne = 2
  feedback: str = 'That is not right. Try again.'
  until_right: bool = True
  right: Fraction = 1.0
  rewarded: str = 'last'
  discount: Fraction = 1.0

  def __post_init__(self):
    if self.rewarded not in REWARDS:
      raise ValueError(f'rewarded {self.rewarded!r}; valid: {list(REWARDS)}')
    others = set(inputs(self.verifier)) - set(READABLE)
    if others or inspect.isclass(self.verifier) or getattr(self.verifier, 'batched', False):
      name = getattr(unbound(self.verifier), '__name__', type(self.verifier).__name__)
      raise ValueError(
        f'verifier {name}: an attempt is judged by its text and its record alone'
        + (f', and it reads {sorted(others)}' if others else '')
      )

  def prepare(self) -> None:
    for library in getattr(unbound(self.verifier), 'imports', ()):
      importlib.import_module(library)

  def reset(self, record: Mapping, seed: int) -> Tried:
    return Tried(dict(record), 0)

  def step(self, state: Tried, text: str) -> Step:
    score = float(call(self.verifier, {'completion': text, 'record': state.record}))
    attempt = state.attempts + 1
    done = attempt >= self.max_turns or (self.until_right and score >= self.right)
    reward = score * self.discount**state.attempts if done or self.rewarded == 'every' else 0.0
    metrics = {'score': score} | ({'first_score': score} if attempt == 1 else {})
    feedback = self.feedback.replace('{score}', f'{score:.2f}')
    return Step(state._replace(attempts=attempt), feedback, reward, done, metrics)
