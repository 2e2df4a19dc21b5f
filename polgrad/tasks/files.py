import os

from ml_collections import ConfigDict

from polgrad.data import sources
from polgrad.registry import find, part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task


def jsonl(
  *,
  data: str,
  reward: str = '',
  reward_options: dict = {},  # noqa: B006
  held_out: str = '',
  holdout: float = 0.1,
  system: str = '',
  prompt_length: int = 256,
  max_new_tokens: int = 256,
  rows: int = 64,
  samples_per_prompt: int = 8,
) -> Task:
  """Your own file of JSON lines: problems, preference pairs, demonstrations or conversations.

  Each line is an object with `prompt` (text) or `messages` ([{role, content}, ...]). `answer` is the
  right answer, for rewards and for supervised learning; `chosen` and `rejected` are the completions
  of a pair; messages that end with an assistant turn are a conversation to imitate. `prompt`, `chosen`
  and `rejected` may be messages too, content may be a list of text parts, and `tools` (a list, or its
  JSON) goes to the chat template. Which methods fit is decided by what all lines have. A line with too
  many tokens is refused; the option `overlong=drop` or `overlong=truncate` of a run drops or cuts it.

  Args:
    data: path of the file.
    reward: verifier by name, such as `numeric_answer` or `exact_match`, or `file.py:function` for one
      of your own; '' for none.
    reward_options: knobs of the verifier.
    held_out: path of a file of problems for evaluation; '' holds out a fraction of `data`.
    holdout: fraction of `data` that is not trained on, if `held_out` is ''; 0 for no evaluation.
    system: system turn that is put before each prompt where the model has a chat template.
    prompt_length: tokens that a prompt may have.
    max_new_tokens: tokens that a completion may have, the stop token included.
    rows: completions in a batch of rollouts.
    samples_per_prompt: completions of a prompt.
  """
  path = os.path.expanduser(data)
  whole = part(sources.jsonl, path=path)
  cut = not held_out and holdout
  train = part(sources.fraction, source=whole, start=holdout, end=1.0) if cut else whole
  kept = part(sources.fraction, source=whole, start=0.0, end=holdout) if cut else None
  if held_out:
    kept = part(sources.jsonl, path=os.path.expanduser(held_out))
  fields = _common_fields(sources.jsonl(path=path))
  return _task(
    train,
    kept,
    fields,
    rewards=_rewards(reward, reward_options),
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    rows=rows,
    samples_per_prompt=samples_per_prompt,
  )


def tfds(
  *,
  data: str,
  split: str = 'train',
  held_out_split: str = '',
  prompt_field: str = 'prompt',
  answer_field: str = 'answer',
  reward: str = '',
  reward_options: dict = {},  # noqa: B006
  system: str = '',
  prompt_length: int = 256,
  max_new_tokens: int = 256,
) -> Task:
  """A TensorFlow Datasets folder in array_record form, read without TensorFlow.

  Args:
    data: the folder of the version, which holds dataset_info.json.
    split: split to train on, or a slice of one such as `train[:90%]`.
    held_out_split: split for evaluation; '' for no evaluation.
    prompt_field: field with the prompt.
    answer_field: field with the answer; '' for none.
    reward, reward_options, system, prompt_length, max_new_tokens: as in `jsonl`.
  """
  read = lambda split: part(
    sources.tfds_records,
    path=os.path.expanduser(data),
    split=split,
    prompt_field=prompt_field,
    answer_field=answer_field,
  )
  return _task(
    read(split),
    read(held_out_split) if held_out_split else None,
    {'prompt', *(['answer'] if answer_field else [])},
    rewards=_rewards(reward, reward_options),
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
  )


def _task(train: ConfigDict, held_out: ConfigDict | None, fields: set[str], **settings) -> Task:
  """A task with what the fields of its records allow."""
  conversations = 'assistant' in fields
  return Task(
    problems=None if conversations else train,
    demonstrations=train if conversations or 'answer' in fields else None,
    pairs=train if 'chosen' in fields else None,
    held_out=held_out if settings['rewards'] and not conversations else None,
    **settings,
  )


def _common_fields(source: sources.Source) -> set[str]:
  """Fields that all records have; 'assistant' where all messages end with an assistant turn."""
  common = None
  for i in range(len(source)):
    record = source[i]
    fields = set(record)
    if 'messages' in record and record['messages'][-1]['role'] == 'assistant':
      fields.add('assistant')
    common = fields if common is None else common & fields
  return common or set()


def _rewards(name: str, options: dict) -> dict[str, ConfigDict]:
  """The verifier of this name with these knobs, as the only term of the reward."""
  if not name:
    return {}
  verifier = find(name, verifiers.TABLE, 'reward')
  return {verifier.__name__: weighted(1.0, part(verifier, **options))}
