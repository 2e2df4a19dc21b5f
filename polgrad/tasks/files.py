import os
from typing import NamedTuple

from ml_collections import ConfigDict

from polgrad import reward_models
from polgrad.data import sources
from polgrad.registry import bind, find, knobs_of, part, weighted
from polgrad.rewards import verifiers
from polgrad.tasks.base import Task

LOOKED_AT = 20_000  # records of a data set that say which fields all records have


class Fields(NamedTuple):
  """Fields of the records of a source; 'assistant' is one where they end with an assistant turn."""

  common: set[str]  # that all records have
  some: set[str]  # that at least one has; where a method needs them, the others are unusable
  most: int = 0  # completions of the longest list


GSM8K_SYSTEM = 'Solve the problem step by step. End with a line of #### and the answer as a number.'
MATH_SYSTEM = 'Solve the problem step by step. Put the final answer into \\boxed{}.'


def jsonl(
  *,
  data: str,
  fields: dict = {},  # noqa: B006
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
  """Your own file of JSON lines: problems, pairs, labelled completions, demonstrations, conversations.

  Each line is an object with `prompt` (text) or `messages` ([{role, content}, ...]). `answer` is the
  right answer, for rewards and for supervised learning; `chosen` and `rejected` are the completions of a
  pair; `label` says whether the completion is good; `completions` and `rewards` are lists; messages that
  end with an assistant turn are a conversation to imitate. `prompt`, `chosen` and `rejected` may be
  messages too, content may be a list of text parts, and `tools` (a list, or its JSON) goes to the chat
  template. Which methods fit is decided by what all lines have. A line with too many tokens is refused;
  the option `overlong=drop` or `overlong=truncate` of a run drops or cuts it.

  Args:
    data: path of the file.
    fields: other names of fields: the name that polgrad reads -> the name in the file.
    reward: verifier by name, such as `numeric_answer` or `exact_match`, or `file.py:function` for one
      of your own; '' for none.
    reward_options: knobs of the verifier; a knob that is a list is written with + between its parts.
    held_out: path of a file for evaluation; '' holds out a fraction of `data`. Accuracy is measured on
      problems, the loss on demonstrations, and loss and preference accuracy on pairs.
    holdout: fraction of `data` that is not trained on, if `held_out` is ''; 0 for no evaluation.
    system: system turn that is put before each prompt where the model has a chat template.
    prompt_length: tokens that a prompt may have.
    max_new_tokens: tokens that a completion may have, the stop token included.
    rows: completions in a batch of rollouts.
    samples_per_prompt: completions of a prompt.
  """
  read = lambda path: part(sources.jsonl, path=os.path.expanduser(path), fields=dict(fields))
  whole = read(data)
  train, kept = (whole, read(held_out)) if held_out else _split(whole, holdout)
  return _task(
    train,
    kept,
    _fields_of(whole),
    held_out_fields=_fields_of(kept) if held_out else None,
    rewards=_rewards(reward, reward_options),
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    rows=rows,
    samples_per_prompt=samples_per_prompt,
  )


def hub(
  *,
  data: str,
  subset: str = '',
  split: str = 'train',
  revision: str = '',
  fields: dict = {},  # noqa: B006
  reward: str = '',
  reward_options: dict = {},  # noqa: B006
  held_out: str = '',
  held_out_split: str = '',
  holdout: float = 0.1,
  system: str = '',
  prompt_length: int = 256,
  max_new_tokens: int = 256,
  rows: int = 64,
  samples_per_prompt: int = 8,
) -> Task:
  """A data set of the hub, a folder, or a file of parquet, JSON, JSON lines or CSV.

  Records are as in `jsonl`.

  Args:
    data: name of the hub such as `openai/gsm8k`, a folder, or a file, see `sources.hub`.
    subset: configuration of the data set, such as `main`; '' is the only one.
    split: split to train on, or a slice of one such as `train[:90%]`.
    revision: branch, tag or commit of the hub; '' is the newest one.
    fields: other names of fields: the name that polgrad reads -> the name in the data set.
    reward, reward_options: as in `jsonl`.
    held_out: name, folder or file of problems for evaluation, without subset and revision.
    held_out_split: split for evaluation, of `held_out` ('' is `train`) or else of `data`. Without
      either, a fraction of the training split is held out.
    holdout: that fraction; 0 for no evaluation.
    system, prompt_length, max_new_tokens, rows, samples_per_prompt: as in `jsonl`.
  """
  whole, train, kept = _hub(
    data, subset, split, revision, fields, held_out, held_out_split, holdout
  )
  return _task(
    train,
    kept,
    _fields_of(whole),
    held_out_fields=_fields_of(kept) if held_out or held_out_split else None,
    rewards=_rewards(reward, reward_options),
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
    rows=rows,
    samples_per_prompt=samples_per_prompt,
  )


def gsm8k(
  *,
  data: str = 'openai/gsm8k',
  subset: str = '',
  split: str = 'train',
  fields: dict = {},  # noqa: B006
  held_out: str = '',
  held_out_split: str = '',
  holdout: float = 0.1,
  system: str = GSM8K_SYSTEM,
  prompt_length: int = 256,
  max_new_tokens: int = 320,
) -> Task:
  """Word problems in the layout of GSM8K (arXiv:2110.14168): `answer` ends with `#### 72`.

  The reward is `numeric_answer`. Demonstrations are whole solutions, without the notes of a calculator
  such as `<<48/2=24>>`. The name `openai/gsm8k` means its subset `main` with the split `test` held out.

  Args:
    data, subset, split, fields, held_out, held_out_split, holdout: as in `hub`.
    system: system turn, which asks for the form of the answer.
    prompt_length: tokens that a prompt may have.
    max_new_tokens: tokens that a completion may have, the stop token included.
  """
  if data == 'openai/gsm8k':
    subset, held_out_split = subset or 'main', held_out_split or 'test'
  whole, train, kept = _hub(data, subset, split, '', fields, held_out, held_out_split, holdout)
  clean = lambda source: source and part(sources.without, source=source, pattern='<<.*?>>')
  return _task(
    clean(train),
    clean(kept),
    _fields_of(whole),
    rewards={'correct': weighted(1.0, part(verifiers.numeric_answer))},
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
  )


def math(
  *,
  data: str,
  subset: str = '',
  split: str = 'train',
  fields: dict = {},  # noqa: B006
  held_out: str = '',
  held_out_split: str = '',
  holdout: float = 0.1,
  system: str = MATH_SYSTEM,
  prompt_length: int = 384,
  max_new_tokens: int = 512,
) -> Task:
  """Problems in the layout of MATH (arXiv:2103.03874): `solution` holds a `\\boxed{}` answer.

  The reward is `boxed_answer`. Where the data have the answer alone, name it: `fields.answer=answer`.

  Args:
    data, subset, split, held_out, held_out_split, holdout: as in `hub`.
    fields: as in `hub`; by default `prompt` is `problem` and `answer` is `solution`.
    system: system turn, which asks for the form of the answer.
    prompt_length: tokens that a prompt may have.
    max_new_tokens: tokens that a completion may have, the stop token included.
  """
  fields = {'prompt': 'problem', 'answer': 'solution', **fields}
  whole, train, kept = _hub(data, subset, split, '', fields, held_out, held_out_split, holdout)
  return _task(
    train,
    kept,
    _fields_of(whole),
    rewards={'correct': weighted(1.0, part(verifiers.boxed_answer))},
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
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
  fields = {'prompt', *(['answer'] if answer_field else [])}
  return _task(
    read(split),
    read(held_out_split) if held_out_split else None,
    Fields(common=fields, some=fields),
    rewards=_rewards(reward, reward_options),
    system=system,
    prompt_length=prompt_length,
    max_new_tokens=max_new_tokens,
  )


def _hub(
  data: str,
  subset: str,
  split: str,
  revision: str,
  fields: dict,
  held_out: str,
  held_out_split: str,
  holdout: float,
) -> tuple[ConfigDict, ConfigDict, ConfigDict | None]:
  """Sources of all records of the training split, of those to train on, and of those to evaluate."""
  read = lambda path, split, **which: part(
    sources.hub, path=os.path.expanduser(path), split=split, fields=dict(fields), **which
  )
  which = dict(subset=subset, revision=revision)
  whole = read(data, split, **which)
  if held_out:
    return whole, whole, read(held_out, held_out_split or 'train')
  if held_out_split:
    return whole, whole, read(data, held_out_split, **which)
  return whole, *_split(whole, holdout)


def _split(whole: ConfigDict, holdout: float) -> tuple[ConfigDict, ConfigDict | None]:
  """A source to train on and one with a fraction of the records for evaluation, None if that is 0."""
  if not holdout:
    return whole, None
  cut = lambda start, end: part(sources.fraction, source=whole, start=start, end=end)
  return cut(holdout, 1.0), cut(0.0, holdout)


def _task(
  train: ConfigDict,
  held_out: ConfigDict | None,
  fields: Fields,
  *,
  held_out_fields: Fields | None = None,
  **settings,
) -> Task:
  """A task with what the fields of its records allow.

  Args:
    held_out_fields: of the held-out records; None: the same.
  """
  conversations = 'assistant' in fields.common
  own = held_out_fields or fields
  kinds = {}
  for name, source, found in (('', train, fields), ('held_out_', held_out, own)):
    paired = source if found.some & {'chosen', 'rejected'} else None
    kinds[f'{name}pairs'] = paired
    kinds[f'{name}feedback'] = paired and part(sources.split_pairs, source=paired)
    if 'label' in found.some and found.some & {'answer', 'assistant'}:
      kinds[f'{name}feedback'] = source
    kinds[f'{name}lists'] = source if 'completions' in found.some else None
  return Task(
    problems=None if conversations else train,
    demonstrations=train if conversations or 'answer' in fields.common else None,
    held_out=None if conversations else held_out,
    held_out_demonstrations=held_out if own.common & {'assistant', 'answer'} else None,
    candidates=max(fields.most, own.most, 2),
    **kinds,
    **settings,
  )


def _fields_of(spec: ConfigDict) -> Fields:
  """The fields of a source; of a large one, `LOOKED_AT` records are read, evenly spaced."""
  source, common, some, most = bind(spec, sources.TABLE, 'data'), None, set(), 0
  for i in sources.spaced(len(source), LOOKED_AT):
    record = source[i]
    fields = set(record)
    if 'messages' in record and record['messages'][-1]['role'] == 'assistant':
      fields.add('assistant')
    common = fields if common is None else common & fields
    some |= fields
    listed = record.get('completions')
    most = max(most, len(listed)) if isinstance(listed, list) else most
  return Fields(common or set(), some, most)


def _rewards(name: str, options: dict) -> dict[str, ConfigDict]:
  """The verifier of this name with these knobs, as the only term of the reward."""
  if not name:
    return {}
  verifier = find(name, reward_models.REWARDS, 'reward')
  several = {n for n, knob in knobs_of(verifier).items() if isinstance(knob.default, tuple)}
  options = {
    n: tuple(value.split('+')) if n in several and isinstance(value, str) else value
    for n, value in options.items()
  }
  return {verifier.__name__: weighted(1.0, part(verifier, **options))}
