"""Random-access data sets of records: `len(source)`, `source[i] -> dict`.

A record has `prompt` (text) or `messages` (a list of {role, content}); `answer` (text) for rewards and
supervised training; `chosen` and `rejected` (texts) for preference training, and `margin` (a number) for
losses that read how much better the first is; `label` beside `answer` for unpaired feedback;
`completions` (texts) with `rewards` (numbers) for lists; `user` and `samples` (texts) beside a pair for
some reward models; `tools` (a list) beside messages, for the chat template; and any other field that a
reward reads.
"""

import dataclasses
import functools
import itertools
import math
import operator as operators
import pathlib
import re
import string
from collections.abc import Callable, Mapping
from typing import Annotated

import numpy as np

from polgrad import paths
from polgrad.data import synthetic_pairs, tables, verifiers_package
from polgrad.data.records import normalized
from polgrad.registry import AtLeastOne, Count, Fraction, Positive, Range, table

OPERATORS = {'+': operators.add, '-': operators.sub, '*': operators.mul}


@dataclasses.dataclass(frozen=True)
class Source:
  """A length and a function from row to record."""

  size: int
  record: Callable[[int], dict]
  irregular: bool = False  # whether one row says little of the others, as in a user's file
  place: Callable[[int], str] = 'row {}'.format  # what a person calls a row, such as file.jsonl:12
  # Of data that no path of the configuration names: what changes with its contents.
  fingerprint: str = ''

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, row: int) -> dict:
    if not 0 <= row < self.size:
      raise IndexError(f'row {row} of {self.size}')
    return self.record(row)


def spaced(count: int, most: int) -> list[int]:
  """At most `most` (0: all) of the rows below `count`, evenly spaced.

  >>> spaced(10, 4)
  [0, 2, 5, 7]
  """
  most = min(most or count, count)
  return [i * count // most for i in range(most)]


def arithmetic(
  *,
  digits: int = 2,
  operator: str = '+',
  split: str = 'train',
  holdout: float = 0.1,
  seed: int = 0,
) -> Source:
  """All problems `a+b=` with numbers of `digits` digits, shuffled and split in 'train' and 'heldout'.

  For the same other arguments, the two splits are disjoint and together contain every problem once.
  Numbers do not begin with 0, except 0 itself when `digits` is 1.

  Args:
    digits: digits of a and b, from 1 to 9.
    operator: '+', '-' or '*'.
    split: 'train' or 'heldout'.
    holdout: fraction of the problems in 'heldout', in [0, 1].
    seed: seed of the shuffle.

  Raises:
    ValueError: an argument out of its range.
  """
  import grain  # here, because it takes a quarter of a second

  if operator not in OPERATORS:
    raise ValueError(f'operator {operator!r}; valid: {sorted(OPERATORS)}')
  if not (1 <= digits <= 9 and 0 <= holdout <= 1):
    raise ValueError(f'digits {digits} must be from 1 to 9 and holdout {holdout} within [0, 1]')
  # A problem is a number below numbers**2; the first ones of a fixed shuffle are held out.
  low = 10 ** (digits - 1) if digits > 1 else 0
  numbers = 10**digits - low
  held = round(holdout * numbers**2)
  ranges = {'train': range(held, numbers**2), 'heldout': range(held)}
  if split not in ranges:
    raise ValueError(f'split {split!r}; valid: {sorted(ranges)}')
  order = grain.MapDataset.range(numbers**2).shuffle(seed=seed)

  def record(row):
    a, b = divmod(int(order[ranges[split][row]]), numbers)
    a, b = a + low, b + low
    return {'prompt': f'{a}{operator}{b}=', 'answer': str(OPERATORS[operator](a, b))}

  return Source(len(ranges[split]), record)


Piles = Annotated[int, Range(at_least=1, at_most=5)]
Digit = Annotated[int, Range(at_least=1, at_most=9)]


def nim_positions(*, piles: Piles = 3, most: Digit = 3, winnable: bool = False) -> Source:
  """Positions of the game of Nim without the empty one, as `prompt`, one digit a pile, and as `piles`.

  Args:
    piles: number of piles.
    most: stones of the largest pile.
    winnable: only positions in which the player to move can win, those whose nim-sum is not 0.
  """
  nim_sum = lambda position: functools.reduce(operators.xor, position)
  found = [p for p in _positions(piles, most) if nim_sum(p) or not winnable]
  return Source(len(found), lambda row: _position(found[row]))


def nim_moves(*, piles: Piles = 3, most: Digit = 3) -> Source:
  """Every legal move of every position of `nim_positions`, good or bad, as the `answer`."""
  found = [
    (position, f'{name}{taken}')
    for position in _positions(piles, most)
    for name, pile in zip(string.ascii_lowercase, position)
    for taken in range(1, pile + 1)
  ]
  return Source(len(found), lambda row: {**_position(found[row][0]), 'answer': found[row][1]})


def _positions(piles, most):
  return [p for p in itertools.product(range(most + 1), repeat=piles) if any(p)]


def _position(piles):
  return {'prompt': ''.join(map(str, piles)), 'piles': list(piles)}


WARM, COLD = ('red', 'orange', 'yellow'), ('blue', 'green', 'violet')


def tastes(
  *, size: AtLeastOne = 2000, first: Count = 0, users: AtLeastOne = 8, seed: Count = 0
) -> Source:
  """Pairs of a warm and a cold colour; half of the users prefer warm colours, the others cold ones.

  Each question is a pair of a random user, whose number is in `user`; those with an even number like
  warm colours. `samples` are two further colours. The prompt is the number of the question. All else
  depends only on that number and `seed`.

  Args:
    size: number of records.
    first: number of the first question.
    users: number of users.
    seed: seed of the users and colours.
  """

  def record(row):
    question = first + row
    rng = np.random.default_rng((seed, question))
    user = int(rng.integers(users))
    warm, cold = WARM[rng.integers(3)], COLD[rng.integers(3)]
    chosen, rejected = (warm, cold) if user % 2 == 0 else (cold, warm)
    samples = [(WARM + COLD)[i] for i in rng.integers(6, size=2)]
    return {
      'prompt': f'{question}:',
      'chosen': chosen,
      'rejected': rejected,
      'user': str(user),
      'samples': samples,
    }

  return Source(size, record)


def seeds(*, size: AtLeastOne = 1000, first: Count = 0) -> Source:
  """Records with an empty prompt and a `seed`, for environments that make what is played themselves.

  Args:
    size: number of records.
    first: seed of the first one.
  """
  return Source(size, lambda row: {'prompt': '', 'seed': first + row})


def jsonl(
  *,
  path: str,
  fields: dict = {},  # noqa: B006
) -> Source:
  """The records of a file with one JSON object per line. All lines are read and checked at once.

  Records may have any of the forms in `polgrad/data/records.py`. Blank lines are skipped. The file is
  UTF-8, or UTF-16 with a byte-order mark, and may be packed by gzip.

  Args:
    path: the file.
    fields: other names of fields: the name that polgrad reads -> the name in the file.

  Raises:
    FileNotFoundError: `path` is not a file.
    ValueError: a malformed row, as `path:line: why`; or there is none.
  """
  if not paths.path(path).is_file():
    raise FileNotFoundError(f'{path}: expected a file of JSON lines, there is none')
  rows, numbers = tables.json_lines(path)
  if not rows:
    raise ValueError(f'{path}: no records')
  place = lambda row: f'{path}:{numbers[row]}'
  for row, value in enumerate(rows):
    try:
      rows[row] = normalized(value, fields)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{place(row)}: {error}') from error
  return Source(len(rows), rows.__getitem__, irregular=True, place=place)


def hub(
  *,
  path: str,
  subset: str = '',
  split: str = 'train',
  revision: str = '',
  fields: dict = {},  # noqa: B006
) -> Source:
  """A data set of Hugging Face `datasets`, or a local file: parquet, JSON, JSON lines or CSV.

  Records may have any of the forms in `polgrad/data/records.py`. `tables.read` says what is read how.

  Args:
    path: a name of the hub such as `openai/gsm8k`, a folder, or a file.
    subset: configuration of the data set, such as `main`; '' is the only one.
    split: a split or a slice of one, such as `train[:90%]`; of a file there is `train` alone.
    revision: branch, tag or commit of the hub; '' is the newest one.
    fields: other names of fields: the name that polgrad reads -> the name in the data set.

  Raises:
    FileNotFoundError, ImportError, ValueError: from `tables.read`; on access, a malformed row, as
      `path:row: why`, where the first row is 1; in JSON lines, the number of the line counts.
  """
  rows = tables.read(path, subset=subset, split=split, revision=revision)

  def record(row):
    try:
      return normalized(tables.plain(rows.row(row)), fields)
    except ValueError as error:
      raise ValueError(f'{rows.place(row)}: {error}') from error

  return Source(rows.size, record, irregular=True, place=rows.place, fingerprint=rows.fingerprint)


def tfds_records(
  *, path: str, split: str, prompt_field: str = 'prompt', answer_field: str = 'answer'
) -> Source:
  """A TensorFlow Datasets directory in array_record form, read without TensorFlow.

  Args:
    path: the directory of a version, which contains dataset_info.json.
    split: a split or a slice of one, such as `train[:90%]`.
    prompt_field: the field that becomes `prompt`.
    answer_field: the field that becomes `answer`, '' for none. All other fields keep their names, and
      bytes are decoded as UTF-8.

  Raises:
    FileNotFoundError: `path` has no data set.
    ValueError: a field that the data set does not have.
  """
  if not (pathlib.Path(path) / 'dataset_info.json').is_file():
    raise FileNotFoundError(f'{path}: expected a TFDS directory with dataset_info.json')
  import tensorflow_datasets as tfds  # here, because it takes seconds

  rows = tfds.builder_from_directory(path).as_data_source(split)
  names = {prompt_field: 'prompt', answer_field: 'answer'}
  missing = {prompt_field, answer_field} - {''} - set(rows.dataset_info.features)
  if missing:
    raise ValueError(
      f'{path}: no field {sorted(missing)}; valid: {sorted(rows.dataset_info.features)}'
    )

  def record(row):
    return {names.get(field, field): _plain(value) for field, value in rows[row].items()}

  return Source(len(rows), record, irregular=True)


def reasoning_gym(
  *,
  task: str,
  size: int,
  seed: int,
  options: dict = {},  # noqa: B006
) -> Source:
  """Problems that the package reasoning-gym generates (arXiv:2505.24760).

  A record has `prompt`, `answer` if there is one, and `entry`, which is everything that reasoning-gym
  returns for the problem. Problem i + 1 of a seed is problem i of the next seed, so the seeds of
  training and evaluation must differ by more than `size`.

  Args:
    task: a data set of reasoning-gym, such as `countdown`.
    size: number of problems.
    seed: seed of the first problem.
    options: settings of the task.

  Raises:
    ImportError: reasoning-gym is not installed.
    ValueError: an unknown task.
  """
  try:
    import reasoning_gym as gym
  except ImportError as error:
    raise ImportError('reasoning-gym is missing; pip install "polgrad[tasks]"') from error
  problems = gym.create_dataset(task, size=size, seed=seed, **options)

  def record(row):
    entry = problems[row]
    answer = {} if entry['answer'] is None else {'answer': str(entry['answer'])}
    return {'prompt': entry['question'], **answer, 'entry': entry}

  return Source(size, record)


def verifiers(
  *,
  load: str,
  options: dict = {},  # noqa: B006
  split: str = 'train',
) -> Source:
  """The data set of an environment of the package verifiers, for `environments.Verifiers`.

  Args:
    load: name of an installed package of an environment, or `file.py:function` for a function that
      returns one.
    options: arguments of its `load_environment`, or of your function.
    split: 'train' or 'eval'; an environment that has no data for 'eval' gives those of 'train'.

  Raises:
    ImportError: the package is not installed.
    ValueError: the environment cannot be loaded or used.
  """
  size, record = verifiers_package.records(load, dict(options), split)
  return Source(size, record, irregular=True)


def _plain(value):
  """Scalars and texts as Python values; other arrays are returned unchanged."""
  value = value.item() if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 else value
  return value.decode('utf-8') if isinstance(value, bytes) else value


def hidden_numbers(
  *,
  highest: Annotated[int, Range(at_least=1, at_most=999)] = 20,
  split: str = 'train',
  holdout: Fraction = 0.1,
  seed: int = 0,
) -> Source:
  """Ranges `3-17:` with a number in them as the answer, for guessing; one prompt in ten is held out.

  Args:
    highest: largest number; every range `a-b` with 0 <= a < b <= highest occurs once.
    split: 'train' or 'heldout'.
    holdout: fraction of the ranges in 'heldout'.
    seed: seed of the numbers, of the order and of what is held out.

  Raises:
    ValueError: another split.
  """
  if split not in ('train', 'heldout'):
    raise ValueError(f"split {split!r}; valid: ['heldout', 'train']")
  random = np.random.default_rng(seed)
  low, high = np.triu_indices(highest + 1, 1)
  order = random.permutation(len(low))
  answers = random.integers(low, high + 1)
  held = round(holdout * len(low))
  rows = order[:held] if split == 'heldout' else order[held:]

  def record(row):
    i = rows[row]
    return {'prompt': f'{low[i]}-{high[i]}:', 'answer': str(answers[i])}

  return Source(len(rows), record)


# What a word problem says, what is to be computed, and its value.
STORIES = (
  (
    '{who} has {a} boxes of {b} {what}. How many {what} is that?',
    *('{a}*{b}', lambda a, b, c: a * b),
  ),
  (
    '{who} has {a} boxes of {b} {what} and gets {c} more. How many {what} is that?',
    *('{a}*{b}+{c}', lambda a, b, c: a * b + c),
  ),
  (
    '{who} has {a} boxes of {b} {what} and loses {c}. How many {what} are left?',
    *('{a}*{b}-{c}', lambda a, b, c: a * b - c),
  ),
  (
    '{who} has {a} {what}, and {b} friends have {c} each. How many {what} is that?',
    *('{a}+{b}*{c}', lambda a, b, c: a + b * c),
  ),
)
NAMES = ('Ann', 'Ben', 'Eva', 'Leo', 'Mia', 'Tom')
THINGS = ('apples', 'books', 'cards', 'nuts', 'pens', 'stamps')


def word_problems(
  *,
  digits: Annotated[int, Range(at_least=1, at_most=9)] = 3,
  size: AtLeastOne = 20_000,
  split: str = 'train',
  seed: int = 0,
) -> Source:
  """Word problems with a product and perhaps a sum or a difference; `expression` is what to compute.

  The problems of the two splits differ in their numbers. One in ten is in 'heldout'.

  Args:
    digits: digits of the numbers.
    size: number of problems.
    split: 'train' or 'heldout'.
    seed: seed of the problems.

  Raises:
    ValueError: another split.
  """
  if split not in ('train', 'heldout'):
    raise ValueError(f"split {split!r}; valid: ['heldout', 'train']")
  least = max(10 ** (digits - 1), 2)

  def record(row):
    random = np.random.default_rng((seed, row))
    told, expression, value = STORIES[random.integers(len(STORIES))]
    who, what = (words[random.integers(len(words))] for words in (NAMES, THINGS))
    # The sum of the numbers says which split they are of.
    numbers = [0, 0, 0]
    while not all(numbers) or (sum(numbers) % 10 == 0) != (split == 'heldout'):
      numbers = random.integers(least, 10**digits, 3).tolist()
    named = dict(zip('abc', numbers))
    return {
      'prompt': told.format(who=who, what=what, **named),
      'answer': str(value(*numbers)),
      'expression': expression.format(**named),
    }

  return Source(size, record)


BASE = table(
  'sources',
  arithmetic,
  hidden_numbers,
  word_problems,
  nim_moves,
  tastes,
  nim_positions,
  seeds,
  jsonl,
  hub,
  tfds_records,
  reasoning_gym,
  verifiers,
)


def fraction(
  *, source: Annotated[Source, BASE], start: float = 0.0, end: float = 1.0, seed: int = 0
) -> Source:
  """The part of another source between two fractions of its rows, shuffled by `seed` first.

  Two parts of one source and seed that do not overlap share no row.

  Raises:
    ValueError: 0 <= start < end <= 1 does not hold, or no row lies between them.
  """
  import grain

  if not 0 <= start < end <= 1:
    raise ValueError(f'start {start} and end {end} must satisfy 0 <= start < end <= 1')
  rows = range(round(start * len(source)), round(end * len(source)))
  if not rows:
    raise ValueError(f'no row of {len(source)} lies between {start} and {end}')
  order = grain.MapDataset.range(len(source)).shuffle(seed=seed)
  there = lambda row: int(order[rows[row]])
  return dataclasses.replace(
    source,
    size=len(rows),
    record=lambda row: source[there(row)],
    place=lambda row: source.place(there(row)),
  )


FRACTION = BASE | table('sources', fraction)


def without(*, source: Annotated[Source, FRACTION], pattern: str, field: str = 'answer') -> Source:
  """Another source, in which what matches a regular expression is deleted from the text of a field."""
  found = re.compile(pattern, re.DOTALL)

  def record(row):
    fields = source[row]
    return fields | ({field: found.sub('', fields[field])} if field in fields else {})

  return dataclasses.replace(source, record=record)


def mixture(*, sources: Mapping[str, Annotated[Source, FRACTION]], most: Count = 0) -> Source:
  """The records of several sources, one of each in turn; `category` is the name of their source.

  Shuffled epochs hold every record once, so a source counts by its number of records. The curricula
  `mixed` and `sec` draw categories with other weights (docs/curricula.md).

  Args:
    sources: by name.
    most: records of each source, from the first; 0: all.

  Raises:
    ValueError: there is no source, or one has a weight.
  """
  weighed = [name for name, one in sources.items() if not isinstance(one, Source)]
  if not sources or weighed:
    raise ValueError(
      f'mixture: it needs sources by name, and weights {weighed} belong to the curriculum `mixed`'
    )
  names = list(sources)
  sizes = [min(len(sources[name]), most or len(sources[name])) for name in names]
  which = np.repeat(np.arange(len(names)), sizes)
  own = np.concatenate([np.arange(size) for size in sizes])
  order = np.lexsort((which, own))

  def find(row):
    name = names[which[order[row]]]
    return name, sources[name], int(own[order[row]])

  def record(row):
    name, source, there = find(row)
    return {**source[there], 'category': name}

  def place(row):
    name, source, there = find(row)
    return f'{name}, {source.place(there)}'

  return Source(
    len(order),
    record,
    irregular=any(one.irregular for one in sources.values()),
    place=place,
    fingerprint='+'.join(one.fingerprint for one in sources.values() if one.fingerprint),
  )


def calls_and_answers(*, source: Annotated[Source, FRACTION]) -> Source:
  """Word problems with the turns of a policy that calls a calculator: two records of each.

  Row 2i has the call `<12*34>` as its `answer`. Row 2i + 1 has the number, and before it the call with
  its result, `<12*34>408>`, as `previous_steps`.
  """

  def record(row):
    fields = source[row // 2]
    call = f'<{fields["expression"]}>'
    if row % 2 == 0:
      return {**fields, 'answer': call}
    return {**fields, 'previous_steps': f'{call}{fields["answer"]}>'}

  return dataclasses.replace(source, size=2 * len(source), record=record)


def worked_sums(*, source: Annotated[Source, FRACTION], seed: int = 0) -> Source:
  """Sums of two numbers with answers of three lengths: the sum, its columns before it, or all work.

  For `16+91=` the answer is `107`, `:07 10 107` (the sum of every column with the carry, units first)
  or `:6+1+0=07:1+9+0=10 107`. Which one depends only on the row and `seed`.

  Args:
    source: problems of `arithmetic` with numbers of equal length.
    seed: seed of the draw.
  """

  def record(row):
    fields = source[row]
    kind = np.random.default_rng((seed, row)).integers(3)
    if kind == 0:
      return fields
    first, second = fields['prompt'].rstrip('=').split('+')
    carry, columns = 0, []
    for a, b in zip(reversed(first), reversed(second), strict=True):
      total = int(a) + int(b) + carry
      columns.append(f'{total:02d}' if kind == 1 else f'{a}+{b}+{carry}={total:02d}')
      carry = total // 10
    between = ' ' if kind == 1 else ':'
    return fields | {'answer': f':{between.join(columns)} {fields["answer"]}'}

  return dataclasses.replace(source, record=record)


def same_sums(
  *, source: Annotated[Source, FRACTION], negatives: AtLeastOne = 4, seed: int = 0
) -> Source:
  """Adds a `query` with the same result and `negatives` with other results to sums of two numbers.

  Their numbers are drawn at random, with at most as many digits as those of the record. They depend only
  on the row and `seed`.

  Args:
    source: problems of `arithmetic`.
    negatives: other sums of a record.
    seed: seed of the numbers.
  """

  def record(row):
    fields = source[row]
    rng = np.random.default_rng((seed, row))
    first, second = map(int, fields['prompt'].rstrip('=').split('+'))
    total, most = first + second, 10 ** len(str(max(first, second))) - 1
    sum_of = lambda a, b: f'{a}+{b}='
    same = int(rng.integers(max(total - most, 0), min(total, most) + 1))
    others = []
    while len(others) < negatives:
      a, b = rng.integers(0, most + 1, size=2).tolist()
      others += [sum_of(a, b)] if a + b != total else []
    return fields | {'query': sum_of(same, total - same), 'negatives': others}

  return dataclasses.replace(source, record=record)


def wrong_digit_pairs(*, source: Annotated[Source, FRACTION], seed: int = 0) -> Source:
  """Adds a preference pair to the records of another source whose answers are whole numbers.

  `chosen` is the answer, `rejected` is the answer with one digit changed, and `margin` is the distance
  of the two numbers. The change depends only on the row and `seed`. A changed number begins with 0 only
  if it has one digit.

  Raises:
    ValueError: on access, an answer that is not a whole number.
  """

  def record(row):
    fields = source[row]
    answer = _whole_number(row, fields)
    wrong = _change_digit(answer, np.random.default_rng((seed, row)))
    return {**fields, 'chosen': answer, 'rejected': wrong, 'margin': _distance(answer, wrong)}

  return dataclasses.replace(source, record=record)


def wrong_digit_lists(
  *,
  source: Annotated[Source, FRACTION],
  size: Annotated[int, Range(at_least=2, at_most=8)] = 4,
  seed: int = 0,
) -> Source:
  """Adds `completions` and `rewards` to the records of another source whose answers are whole numbers.

  One completion is the answer, with the reward 1. The others are the answer with one digit changed, and
  have the reward 0; all differ. Their order depends only on the row and `seed`.

  Args:
    source: records with `prompt` and `answer`.
    size: completions of a record.
    seed: seed of the wrong ones and of the order.

  Raises:
    ValueError: on access, an answer that is not a whole number.
  """

  def record(row):
    fields = source[row]
    rng = np.random.default_rng((seed, row))
    texts = _with_wrong(_whole_number(row, fields), size, rng)
    order = [int(i) for i in rng.permutation(size)]
    rewards = [float(i == 0) for i in order]
    return {**fields, 'completions': [texts[i] for i in order], 'rewards': rewards}

  return dataclasses.replace(source, record=record)


def with_choices(
  *, source: Annotated[Source, FRACTION], letters: str = 'ABCD', seed: int = 0
) -> Source:
  """Makes multiple-choice questions of another source whose answers are whole numbers.

  The choices follow the prompt, one a line, as `A 46`. One is the answer; the others are the answer
  with one digit changed, and all differ. `answer` becomes the letter of the right choice, `chosen` is
  the same, `rejected` the letter of a wrong one, and `margin` the distance of the two numbers;
  `completions` are all letters, with `rewards` 1 for the right one and 0. All depend only on the row and
  `seed`.

  Args:
    source: records with `prompt` and `answer`.
    letters: names of the choices, from two to eight.
    seed: seed of the choices and their order.

  Raises:
    ValueError: letters too few, too many or alike; on access, an answer that is not a whole number.
  """
  if not 2 <= len(letters) <= 8 or len(set(letters)) < len(letters):
    raise ValueError(f'letters {letters!r} must be two to eight different ones')

  def record(row):
    fields = source[row]
    answer = _whole_number(row, fields)
    rng = np.random.default_rng((seed, row))
    choices = _with_wrong(answer, len(letters), rng)
    order = [int(i) for i in rng.permutation(len(letters))]
    lines = [f'{letter} {choices[i]}' for letter, i in zip(letters, order, strict=True)]
    right = letters[order.index(0)]
    return {
      **fields,
      'prompt': '\n'.join([fields['prompt'], *lines]),
      'answer': right,
      'chosen': right,
      'rejected': letters[order.index(1)],
      'margin': _distance(*choices[:2]),
      'completions': list(letters),
      'rewards': [float(letter == right) for letter in letters],
    }

  return dataclasses.replace(source, record=record)


def _distance(a, b):
  return float(abs(int(a) - int(b)))


def _with_wrong(answer, count, rng):
  """`count` different numbers of one length, the answer first."""
  found = [answer]
  while len(found) < count:
    wrong = _change_digit(answer, rng)
    if wrong not in found:
      found.append(wrong)
  return found


def _whole_number(row, fields):
  answer = fields.get('answer', '')
  if not re.fullmatch(r'-?\d+', answer):
    raise ValueError(f'row {row}: the answer {answer!r} is no whole number')
  return answer


def _change_digit(number, rng):
  """A different number of the same length: one digit is replaced, and the sign is kept."""
  places = [i for i, character in enumerate(number) if character.isdigit()]
  place = rng.choice(places)
  leads = place == places[0] and len(number) > 1
  digits = sorted(set('123456789' if leads else '0123456789') - {number[place]})
  return number[:place] + str(rng.choice(digits)) + number[place + 1 :]


OF_SOURCE = FRACTION | table(
  'sources',
  without,
  mixture,
  calls_and_answers,
  same_sums,
  worked_sums,
  wrong_digit_pairs,
  wrong_digit_lists,
  with_choices,
)


def between(
  *,
  source: Annotated[Source, OF_SOURCE],
  field: str,
  at_least: float = -math.inf,
  below: float = math.inf,
) -> Source:
  """The records of another source whose number in a field is in [at_least, below).

  With one number as `below` of a part and `at_least` of another, a source is split in two, such as pairs
  into hard and easy ones by their `margin`. All records are read at once.

  Raises:
    ValueError: a record has no such number, or none is between the bounds.
  """
  rows = []
  for row in range(len(source)):
    value = source[row].get(field)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise ValueError(f'{source.place(row)}: {field} must be a number, got {value!r}')
    if at_least <= value < below:
      rows.append(row)
  if not rows:
    raise ValueError(f'no record of {len(source)} has {field} in [{at_least}, {below})')
  return dataclasses.replace(
    source,
    size=len(rows),
    record=lambda row: source[rows[row]],
    place=lambda row: source.place(rows[row]),
  )


def split_pairs(*, source: Annotated[Source, OF_SOURCE]) -> Source:
  """The two completions of every preference pair as separate records, with a `label`.

  Row 2i has the chosen completion of pair i as its `answer` and the label 1, row 2i + 1 the rejected one
  and the label 0. A pair that lacks one of them gives a record without an answer.
  """

  def record(row):
    fields = dict(source[row // 2])
    fields.pop('answer', None)
    both = fields.pop('chosen', None), fields.pop('rejected', None)
    answer = {} if both[row % 2] is None else {'answer': both[row % 2]}
    return {**fields, **answer, 'label': 1.0 - row % 2}

  return dataclasses.replace(
    source, size=2 * len(source), record=record, place=lambda row: source.place(row // 2)
  )


PLAIN = OF_SOURCE | table('sources', between, split_pairs)


def as_chat(*, source: Annotated[Source, PLAIN], system: str = '') -> Source:
  """Another source's records as conversations, for models that were tuned to chat.

  A `prompt` becomes `messages` with a user turn. A system turn is put first: the record's own
  `system`, else `system`, unless the record has a system turn already.
  """

  def record(row):
    fields = dict(source[row])
    turns = fields.pop('messages', None) or [{'role': 'user', 'content': fields.pop('prompt')}]
    first = fields.pop('system', '') or system
    if first and turns[0]['role'] != 'system':
      turns = [{'role': 'system', 'content': first}, *turns]
    return {'messages': turns, **fields}

  return dataclasses.replace(source, record=record)


CHAT = PLAIN | table('sources', as_chat)


def nothing() -> Source:
  """A source without records."""
  return Source(0, lambda row: {})


def with_context(
  *,
  source: Annotated[Source, CHAT],
  more: Annotated[Source, CHAT | table('sources', nothing)] = nothing,
  field: str = 'user',
  pairs: AtLeastOne = 8,
  seed: int = 0,
) -> Source:
  """Another source's preference pairs, each beside other pairs of the same user, its `context`.

  The context is a list of at most `pairs` other records of the user, drawn without replacement; which
  ones depends only on the row and `seed`. A record whose user has no other pair has an empty list, and
  one without a user has no context. All users are read with the first record.

  Args:
    source: records with `chosen` and `rejected`, and the user in a field.
    more: records that the context may be of as well, such as those that are trained on where `source`
      is held out.
    field: name of the field with the user, a text or a number.
    pairs: most pairs of a context.
    seed: seed of the draws.
  """
  both = (source, more)

  @functools.cache
  def places():
    """Of each user, (index into `both`, row) of the records."""
    found = {}
    for which, one in enumerate(both):
      for row in range(len(one)):
        found.setdefault(user_of(one[row], field), []).append((which, row))
    return found

  def record(row):
    fields = source[row]
    user = user_of(fields, field)
    if user is None:
      return fields
    others = [place for place in places()[user] if place != (0, row)]
    drawn = np.random.default_rng((seed, row)).permutation(len(others))[:pairs]
    return {**fields, 'context': [both[which][r] for which, r in (others[int(i)] for i in drawn)]}

  return dataclasses.replace(source, record=record)


def with_demonstrations(
  *,
  source: Annotated[Source, CHAT],
  demonstrations: Annotated[Source, CHAT | table('sources', nothing)] = nothing,
  count: AtLeastOne = 2,
  seed: int = 0,
) -> Source:
  """Another source's records, each beside `count` records of other prompts, its `demonstrations`.

  Which ones depends only on the row and `seed`. They differ from each other where there are enough.

  Args:
    source: records of the prompts.
    demonstrations: records with an `answer`; `nothing` draws them of `source`, never the record itself.
    count: records beside each.
    seed: seed of the draws.

  Raises:
    ValueError: `source` has a single record, and there are no demonstrations.
  """
  own = not len(demonstrations)
  most = len(source) - 1 if own else len(demonstrations)
  if most < 1:
    raise ValueError(
      'with_demonstrations: the only record of the source has no other ones beside it'
    )

  def record(row):
    drawn = np.random.default_rng((seed, row)).choice(most, size=count, replace=count > most)
    if own:  # the rows without this one
      return {**source[row], 'demonstrations': [source[int(i + (i >= row))] for i in drawn]}
    return {**source[row], 'demonstrations': [demonstrations[int(i)] for i in drawn]}

  fingerprint = source.fingerprint + demonstrations.fingerprint
  return dataclasses.replace(source, record=record, fingerprint=fingerprint)


def confident_pairs(
  *,
  source: Annotated[Source, CHAT],
  confidence: Fraction = 0.5,
  answer: str = '(?s)(.*)',
  seed: int = 0,
) -> Source:
  """Another source's preference pairs, and pairs made of its lists: RLP-SPG (arXiv:2403.19279).

  A record with `chosen` and `rejected` stays. One with `completions`, samples of a policy, and their
  `rewards`, by a reward model, becomes a pair if enough of the samples say the same, see
  `synthetic_pairs.confident_pair`; else it is left out, as are all other records. All records of
  files are read when the source is made.

  Args:
    source: records of both kinds.
    confidence: fraction of the samples that must say the same.
    answer: regular expression; samples say the same if the first groups of its last matches are equal.
      Records with a list `clusters`, a number or text for each sample, say it themselves.
    seed: seed of the draw of the other sample.

  Raises:
    ValueError: nothing is left, completions that are no texts, rewards that are no finite numbers, or
      lists of different lengths.
  """
  re.compile(answer)  # refuses what is no regular expression, whatever the records are
  paired = lambda fields: 'chosen' in fields and 'rejected' in fields
  if not source.irregular and paired(source[0]):
    return source  # all are pairs, where one row tells of the others

  found = {}  # row of the pair -> (row of the record, what makes it a pair)
  for row in range(len(source)):
    fields = source[row]
    if paired(fields):
      found[len(found)] = row, {}
    elif 'completions' in fields:
      pair = _synthetic(fields, source.place(row), confidence, answer, (seed, row))
      if pair:
        found[len(found)] = row, pair
  if not found:
    raise ValueError(
      f'none of {len(source)} records is a pair, or has completions of which {confidence:g} say the same'
    )

  def record(row):
    original, pair = found[row]
    return {**source[original], **pair}

  place = lambda row: source.place(found[row][0])
  return dataclasses.replace(source, size=len(found), record=record, place=place)


def _synthetic(fields, place, confidence, answer, seed):
  """`chosen` and `rejected` of a record with completions and rewards; {} if no pair is sure enough."""
  texts, scores = fields['completions'], fields.get('rewards')
  if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f'{place}: completions must be a list of texts, got {texts!r:.80}')
  if not isinstance(scores, list) or not all(map(_finite, scores)):
    raise ValueError(f'{place}: rewards must be a list of finite numbers, got {scores!r:.80}')
  said = fields.get('clusters') or [last_match(text, answer) for text in texts]
  if not isinstance(said, list) or not len(texts) == len(scores) == len(said):
    raise ValueError(f'{place}: completions, rewards and clusters must be lists of one length')
  draw = np.random.default_rng(seed).random()
  pair = synthetic_pairs.confident_pair(said, scores, draw, confidence=confidence)
  return {} if pair is None else {'chosen': texts[pair[0]], 'rejected': texts[pair[1]]}


def private_bags(
  *,
  source: Annotated[Source, CHAT],
  epsilon: Positive = 1.0,
  low: float = 0.0,
  high: float = 1.0,
  seed: int = 0,
) -> Source:
  """Another source's lists, of which only a noisy mean reward is left (arXiv:2401.11081).

  Rewards of a record are truncated to [low, high], and each is replaced by their mean plus a draw from
  Laplace(0, (high - low) / (m epsilon)) for m completions. A change of one reward moves the mean by at
  most (high - low) / m, so the label of the bag is epsilon-differentially private. The draw depends on
  the row and `seed` alone: reading a row again tells nothing more. Whoever knows the seed can undo the
  noise, so choose one that is secret.

  Args:
    source: records with `rewards`, lists of numbers.
    epsilon: privacy budget of a record; smaller is more private and noisier.
    low, high: bounds of a reward.
    seed: seed of the draws.

  Raises:
    ValueError: `low` is not below `high`; from a record, rewards that are no finite numbers.
  """
  if not low < high:
    raise ValueError(f'private_bags: low={low:g} must be below high={high:g}')

  def record(row):
    fields = source[row]
    rewards = fields.get('rewards')
    if not isinstance(rewards, list) or not rewards or not all(map(_finite, rewards)):
      raise ValueError(
        f'{source.place(row)}: rewards must be a list of finite numbers, got {rewards!r:.80}'
      )
    noise = np.random.default_rng((seed, row)).laplace(0, (high - low) / (len(rewards) * epsilon))
    mean = float(np.mean(np.clip(rewards, low, high)) + noise)
    return {**fields, 'rewards': [mean] * len(rewards)}

  return dataclasses.replace(source, record=record)


def _finite(value):
  return isinstance(value, int | float) and math.isfinite(value)


def last_match(text: str, pattern: str) -> str:
  """The first group of the pattern's last match, or the text if there is none; both stripped.

  A pattern without groups is itself the group.
  """
  matches = list(re.finditer(pattern, text))
  found = matches[-1][min(matches[-1].re.groups, 1)] if matches else ''
  return (found or text).strip()


def user_of(record: Mapping, field: str) -> str | None:
  """The user of a record as text; None if it names none."""
  found = record.get(field)
  return None if found is None or found == '' else str(found)


TABLE = CHAT | table('sources', with_context, with_demonstrations, confident_pairs, private_bags)
Part = Annotated[Source, TABLE]
