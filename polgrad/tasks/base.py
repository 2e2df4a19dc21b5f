"""What a task is: what to learn, how it is judged, and how much of it makes a batch."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Annotated

from ml_collections import ConfigDict

from polgrad.registry import AtLeastOne, Count, Positive, Range, check_ranges

# Kinds of data, each the name of a field of `Task`.
KINDS = ('problems', 'demonstrations', 'pairs', 'feedback', 'lists')
PRINTABLE = string.printable[:95] + '\n'  # of ASCII


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Data, verifiers and budgets as parts; what a task does not have is None.

  Attributes:
    problems: source of prompts to sample from.
    demonstrations: source of prompts with an `answer`, or of whole conversations.
    pairs: source of prompts with `chosen` and `rejected` completions.
    feedback: source of prompts with a completion and its `label`.
    lists: source of prompts with several `completions` and their `rewards`.
    held_out: source of problems that are not trained on, for evaluation.
    held_out_demonstrations: source of demonstrations that are not trained on, to measure the loss.
    held_out_pairs: source of pairs that are not trained on, to measure loss and accuracy.
    held_out_feedback: source of feedback that is not trained on, to measure the loss.
    held_out_lists: source of lists that are not trained on, to measure the loss.
    rewards: verifiers by name, each with its weight; their weighted sum is the reward. With an
      environment, they judge the last turn, and its reward is added.
    environment: what answers the turns of the policy, a part of `polgrad.environments`.
    held_out_environment: of the evaluation; None: the same.
    turn_tokens: tokens that the policy may draw in one turn; 0: only the row has a limit.
    observation_tokens: tokens of a message that the policy reads; 0: only the row has a limit.
    system: system turn that is put before each prompt where the model has a chat template.
    alphabet: characters of prompts and answers, for models whose tokens are characters.
    prompt_length: tokens that a prompt may have, without those of a chat template.
    max_new_tokens: tokens that a completion may have, the stop token included; with an environment,
      those of all turns and of what is read between them.
    length: tokens of a row with its given completion; 0 means prompt_length + max_new_tokens.
    rows: completions in a batch of rollouts; rows / samples_per_prompt prompts are drawn.
    samples_per_prompt: completions of a prompt, unless the method asks for another number.
    demonstration_rows: rows in a batch of demonstrations.
    pairs_per_batch: pairs in a batch of preferences; a batch of feedback has twice as many rows.
    candidates: completions that a list may have. A batch has 2 * pairs_per_batch / candidates lists, so
      about as many rows as a batch of pairs.
    temperature: of sampling.
    steps: batches to collect.
    evaluate_every: batches between evaluations.
    held_out_problems: problems in an evaluation.
    evaluation_batch: of these, how many are decoded at once.
    prefix: given beginning of every sampled completion, such as `<think>`, see `collect.Sampling`.
    stop_strings: texts that end a completion, besides the stop tokens. An option of a run gives one.
    overlong: of records that have more tokens: 'error', 'drop' or 'truncate', see `collect.Collector`.
    unusable: of records with completions from which nothing can be learned, or with a field missing:
      'error' or 'drop', see `collect.Given`.
  """

  problems: ConfigDict | None = None
  demonstrations: ConfigDict | None = None
  pairs: ConfigDict | None = None
  held_out: ConfigDict | None = None
  held_out_demonstrations: ConfigDict | None = None
  held_out_pairs: ConfigDict | None = None
  feedback: ConfigDict | None = None
  held_out_feedback: ConfigDict | None = None
  lists: ConfigDict | None = None
  held_out_lists: ConfigDict | None = None
  rewards: Mapping[str, ConfigDict] = dataclasses.field(default_factory=dict)
  environment: ConfigDict | None = None
  held_out_environment: ConfigDict | None = None
  turn_tokens: Count = 0
  observation_tokens: Count = 0
  system: str = ''
  alphabet: str = PRINTABLE
  prompt_length: AtLeastOne = 256
  max_new_tokens: AtLeastOne = 256
  length: Count = 0
  rows: AtLeastOne = 64
  samples_per_prompt: AtLeastOne = 8
  demonstration_rows: AtLeastOne = 32
  pairs_per_batch: AtLeastOne = 16
  candidates: Annotated[int, Range(at_least=2)] = 4
  temperature: Positive = 1.0
  steps: AtLeastOne = 100
  evaluate_every: Count = 50
  held_out_problems: AtLeastOne = 200
  evaluation_batch: AtLeastOne = 50
  prefix: str = ''
  stop_strings: tuple = ()
  overlong: str = 'error'
  unusable: str = 'error'

  def __post_init__(self):
    check_ranges(type(self), vars(self), 'task')

  @property
  def has(self) -> tuple[str, ...]:
    """What methods can ask for, out of `KINDS`."""
    return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

  @property
  def judged(self) -> bool:
    """Whether something gives a reward: verifiers, or the environment."""
    return bool(self.rewards) or self.environment is not None

  @property
  def turns(self) -> dict[str, object]:
    """The settings of whatever samples that say how turns are answered, see `collect.Turns`."""
    if self.environment is None:
      return {}
    names = ('environment', 'turn_tokens', 'observation_tokens')
    return {name: getattr(self, name) for name in names}

  @property
  def held_out_turns(self) -> dict[str, object]:
    """What differs from `turns` in the evaluation."""
    found = self.held_out_environment
    return {} if found is None else {'environment': found}
