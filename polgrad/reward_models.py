"""Reward models as verifiers: folders with a scalar head score the completions of a run.

    reward=reward_model,reward.path=FOLDER                       as options of a run
    --config.phases.train.reward.reward_model.clip=5.0           as a change of its configuration

A folder is what `polgrad.convert --reward_model` writes: a classifier of Hugging Face with one label. It
has its own tokenizer and chat template, so it may be of another family than the policy. `REWARDS` are
all verifiers by the names that a configuration uses: those of `rewards.verifiers`, and these.
`COMPARISONS` are likewise all functions that compare two completions, and `SPANS` those that score parts
of a completion.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from polgrad import sharding
from polgrad.compiling import jit
from polgrad.data import batching, sources, tokenizers
from polgrad.data.tokenizers import Tokenizer
from polgrad.losses import latent_preferences
from polgrad.models import Policy, heads, hf, pretrained
from polgrad.objectives import heads as objective_heads
from polgrad.packing import padded
from polgrad.registry import AtLeastOne, Count, NotNegative, Positive, bind, either, suggest, table
from polgrad.rewards import comparisons, judge, spans, verifiers
from polgrad.rewards.scoring import Failure
from polgrad.types import Array, Params


class Scorer(NamedTuple):
  """A reward model in memory, as a function of rows of tokens."""

  # Rows of ids -> scores f64[rows]; of a model of users, the states f64[rows, D] at their last tokens.
  score: Callable[[list[list[int]]], np.ndarray]
  tokenizer: Tokenizer
  chats: bool  # whether the tokenizer has a chat template
  max_length: int  # tokens that a row may have


def reward_model(
  *,
  path: str,
  ensemble: tuple = (),
  combine: Literal['mean', 'min'] = 'mean',
  pessimism: NotNegative = 0.0,
  mean: float = 0.0,
  std: Positive = 1.0,
  clip: NotNegative = 0.0,
  before: str = '',
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
  devices: Count = 0,
  fsdp: AtLeastOne = 1,
) -> Callable:
  """A verifier of whole batches: the score that a reward model gives to prompt and completion.

      reward = clip((combined score - mean) / std)

  The prompt is put into the reward model's own chat template, if it has one, and the score is read at
  the stop token that ends the completion. With several models the combined score is their mean less
  `pessimism` times their standard deviation, or their minimum: where they disagree, a completion is far
  from what they were trained on. A row that is too long, or that its tokenizer cannot write, has failed;
  it is masked out and counted.

  Nothing is estimated from the completions of a run, so the reward of a completion depends neither on
  its batch nor on how often a run was resumed. Parameters are read with the first batch and stay on the
  devices; each process of a pod has its own copy and scores its own rows.

  Args:
    path: folder of the reward model.
    ensemble: folders of further models.
    combine: 'mean' (less `pessimism` standard deviations) or 'min'.
    pessimism: k in mean - k std; the std divides by the number of models.
    mean: subtracted from the combined score.
    std: divides the difference.
    clip: largest absolute value of the reward; 0 for no limit.
    before: field of the record with a completion that the model reads first, as those trained by
      `methods.polar` do; '' for none.
    batch: rows that are forwarded at once.
    max_length: tokens that a row may have; 0 is the limit of the model.
    dtype: of the computation, 'float32' or 'bfloat16'.
    devices: how many devices of each process it runs on, counted from the last; 0 is as many as `fsdp`
      divides.
    fsdp: number of these devices that the parameters are cut over.

  Raises:
    FileNotFoundError: a folder or one of its files is missing.
    ValueError: a folder that holds no reward model, or more devices than there are.
  """
  settings = dict(batch=batch, max_length=max_length, dtype=dtype, devices=devices, fsdp=fsdp)
  folders = tuple(_checked(folder) for folder in (path, *ensemble))
  sharding.last_devices(devices, fsdp)  # refuses what does not fit

  def judge(completions: list[str], records: list[dict]) -> list[float | Failure]:
    firsts = [record.get(before) for record in records] if before else None
    found = [scores(load(folder, **settings), records, completions, firsts) for folder in folders]
    failed = {j: x for one in found for j, x in enumerate(one) if isinstance(x, Failure)}
    # [models, rows]; a failure of one model is a failure of the row.
    each = np.array([[np.nan if isinstance(x, Failure) else x for x in one] for one in found])
    least, middle = each.min(axis=0), each.mean(axis=0) - pessimism * each.std(axis=0)
    rewards = ((least if combine == 'min' else middle) - mean) / std
    rewards = np.clip(rewards, -clip, clip) if clip else rewards
    return [failed.get(j, float(x)) for j, x in enumerate(rewards)]

  judge.batched = True
  judge.__qualname__ = 'reward_model'
  return judge


def user_reward_model(
  *,
  path: str,
  pairs: str = '',
  user: str = '',
  field: str = 'user',
  unknown: Literal['fail', 'prior'] = 'fail',
  mean: float = 0.0,
  std: Positive = 1.0,
  clip: NotNegative = 0.0,
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
  devices: Count = 0,
  fsdp: AtLeastOne = 1,
) -> Callable:
  """A verifier of whole batches: the score that a user gives to prompt and completion, as a model of
  `methods.vpl` predicts it.

      reward = clip((r(y, z) - mean) / std),  z the mean of q(z | labelled pairs of the user)

  Scores of different users have different scales, so compare them within the completions of a prompt, as
  GRPO does.

  Args:
    path: folder of the model, which `polgrad.convert --reward_model` wrote.
    pairs: file of JSON lines with labelled pairs of users: `prompt`, `chosen`, `rejected` and the user.
      Of a user the first ones are read, as many as a user had in training. '' is none.
    user: whose rewards are given; '' is the user whom the record names.
    field: field with the user, in the file and in the records.
    unknown: what a completion gets for a user without pairs: 'fail' makes the row invalid, 'prior' gives
      the mean reward over 64 users that are drawn from the prior.
    mean, std, clip, batch, max_length, dtype, devices, fsdp: as in `reward_model`.

  Raises:
    FileNotFoundError: the folder, one of its files or the file of pairs is missing.
    ValueError: a folder whose model has no users, a `user` without pairs, a pair that lacks a field, or
      more devices than there are.
  """
  settings = dict(batch=batch, max_length=max_length, dtype=dtype, devices=devices, fsdp=fsdp)
  folder, head = _with_user(path)
  sharding.last_devices(devices, fsdp)
  users = _Users(folder, head, _pairs_of_users(pairs, field), settings, unknown == 'prior')
  if user:
    users.check(user)

  def judge(completions: list[str], records: list[dict]) -> list[float | Failure]:
    names = [user or sources.user_of(record, field) or '' for record in records]
    found = users.rewards(names, records, completions)
    normalised = [x if isinstance(x, Failure) else (x - mean) / std for x in found]
    if not clip:
      return normalised
    return [x if isinstance(x, Failure) else min(max(x, -clip), clip) for x in normalised]

  judge.batched = True
  judge.__qualname__ = 'user_reward_model'
  return judge


@dataclasses.dataclass(frozen=True, eq=False)
class _Users:
  """The users of a model of `methods.vpl`, whose latents are computed when they are first needed."""

  folder: str
  head: objective_heads.LatentUser
  pairs: Mapping[str, list[dict]]  # labelled pairs by user
  settings: Mapping[str, Any]  # of `load`
  prior: bool  # whether a user without pairs is one of the prior
  latents: dict[str, Array] = dataclasses.field(default_factory=dict)

  def check(self, user: str) -> None:
    """Refuses a user without pairs, or '' for none, unless it is one of the prior."""
    if user in self.pairs or self.prior:
      return
    if not user:
      raise ValueError('the record names no user')
    raise ValueError(f'the user {user!r} has no labelled pair{suggest(user, self.pairs)}')

  def rewards(
    self, names: list[str], records: list[dict], completions: list[str]
  ) -> list[float | Failure]:
    """What the user of each completion gives it."""
    found = _read(load(self.folder, **self.settings), records, completions)
    return [self.reward(*one) for one in zip(names, found, strict=True)]

  def reward(self, name: str, state: np.ndarray | Failure) -> float | Failure:
    if isinstance(state, Failure):
      return state
    try:
      self.check(name)
    except ValueError as error:
      return Failure('KeyError', str(error))
    z = self.latent(name if name in self.pairs else '')
    states = np.repeat(state[None], len(z), axis=0).astype(np.float32)
    return float(np.mean(latent_preferences.reward(_layers(self.folder), states, z)))

  def latent(self, name: str) -> Array:
    """z of a user [1, L]; '' is that of 64 users of the prior [64, L]."""
    if name not in self.latents:
      if name:
        posterior = self.posterior(name)
        noise = np.zeros(posterior.mean.shape, np.float32)
      else:
        zero = np.zeros((64, self.head.latent), np.float32)
        posterior = latent_preferences.Posterior(zero, zero)
        noise = np.random.default_rng(0).normal(size=zero.shape).astype(np.float32)
      z = latent_preferences.sample(posterior, noise, normalize=self.head.normalize)
      self.latents[name] = z
    return self.latents[name]

  def posterior(self, name: str) -> latent_preferences.Posterior:
    """q(z | labelled pairs of a user), [1, L]."""
    pairs = self.pairs[name][: self.head.context]
    texts = [one[key] for key in ('chosen', 'rejected') for one in pairs]
    states = _read(load(self.folder, **self.settings), pairs * 2, texts)
    bad = [x.reason for x in states if isinstance(x, Failure)]
    if bad:
      raise ValueError(f'a labelled pair of the user {name!r} cannot be read: {bad[0]}')
    both = np.stack(states).reshape(2, 1, len(pairs), -1).astype(np.float32)
    return latent_preferences.encode(_layers(self.folder), *both)


def preference_model(
  *,
  path: str,
  temperature: Positive = 1.0,
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
  devices: Count = 0,
  fsdp: AtLeastOne = 1,
) -> Callable:
  """A comparison of whole batches: sigmoid(g(y, y') / temperature), with a model that reads both.

  g(y, y') = s(y', then y) - s(y, then y') is the logit that `methods.pairwise_preference` trains, s the
  score at the last token of the row. P(first better) + P(second better) is one. A pair of which a row
  is too long has failed.

  Args:
    path: folder of the model, which `polgrad.convert --reward_model` wrote.
    temperature: unit of g.
    batch, max_length, dtype, devices, fsdp: as in `reward_model`.

  Raises:
    FileNotFoundError, ValueError: as in `reward_model`.
  """
  settings = dict(batch=batch, max_length=max_length, dtype=dtype, devices=devices, fsdp=fsdp)
  folder = _checked(path)
  sharding.last_devices(devices, fsdp)

  def compare(first: list[str], second: list[str], record: list[dict]) -> list[float | Failure]:
    rows = scores(load(folder, **settings), record * 2, first + second, second + first)
    return [win(*pair) for pair in zip(rows[: len(first)], rows[len(first) :])]

  def win(one: float | Failure, other: float | Failure) -> float | Failure:
    for score in (one, other):
      if isinstance(score, Failure):
        return score
    return comparisons.by_reward(one, other, temperature=temperature)

  compare.batched = True
  compare.__qualname__ = 'preference_model'
  return compare


def step_model(
  *,
  path: str,
  pattern: str = r'\n\s*',
  scale: Positive = 1.0,
  most: AtLeastOne = 64,
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
  devices: Count = 0,
  fsdp: AtLeastOne = 1,
) -> Callable:
  """Scores of the steps of completions: tanh(s / (2 scale)), s the score of the text up to the end of
  the step.

  If the model was trained to say whether a solution is still right, with logit s, this is P(right) -
  P(wrong), in [-1, 1], as PURE reads it (arXiv:2504.15275). A completion with a step whose text is too
  long for the model has failed.

  Args:
    path: folder of the reward model, see `reward_model`.
    pattern: regular expression; a step ends with a match of it.
    scale: unit of the logit.
    most: largest number of steps of a completion; of more, what follows the last one belongs to it.
    batch, max_length, dtype, devices, fsdp: as in `reward_model`.

  Raises:
    FileNotFoundError, ValueError: as in `reward_model`.
  """
  settings = dict(batch=batch, max_length=max_length, dtype=dtype, devices=devices, fsdp=fsdp)
  folder = _checked(path)
  sharding.last_devices(devices, fsdp)

  def judge(completions: list[str], records: list[dict]) -> list[list[spans.Span] | Failure]:
    steps = [spans.steps(text, pattern) for text in completions]
    steps = [
      [*one[: most - 1], (one[most - 1][0], one[-1][1])] if len(one) > most else one
      for one in steps
    ]
    prefixes = [text[:end] for text, one in zip(completions, steps) for _, end in one]
    owners = [record for record, one in zip(records, steps) for _ in one]
    found = iter(scores(load(folder, **settings), owners, prefixes))
    return [_steps_of(one, [next(found) for _ in one], scale) for one in steps]

  judge.batched = True
  judge.__qualname__ = 'step_model'
  return judge


def _steps_of(
  places: list[tuple[int, int]], found: list[float | Failure], scale: float
) -> list[spans.Span] | Failure:
  """The steps of a completion with their scores, or the first failure."""
  failed = [x for x in found if isinstance(x, Failure)]
  if failed:
    return failed[0]
  return [(*place, math.tanh(x / (2 * scale))) for place, x in zip(places, found, strict=True)]


def scores(
  scorer: Scorer,
  records: Sequence[Mapping],
  texts: Sequence[str],
  firsts: Sequence[str | None] | None = None,
) -> list[float | Failure]:
  """The score of each completion, or why it has none.

  Args:
    firsts: completions that the model reads before; None: it reads one completion.
  """
  found = _read(scorer, records, texts, firsts)
  return [x if isinstance(x, Failure) else float(x) for x in found]


def _read(
  scorer: Scorer,
  records: Sequence[Mapping],
  texts: Sequence[str],
  firsts: Sequence[str | None] | None = None,
) -> list[np.ndarray | Failure]:
  """What the model says of each completion, an entry of what `Scorer.score` returns."""
  rows = [
    _row(scorer, record, text, *([] if firsts is None else [firsts[i]]))
    for i, (record, text) in enumerate(zip(records, texts, strict=True))
  ]
  kept = [i for i, row in enumerate(rows) if not isinstance(row, Failure)]
  found = dict(zip(kept, scorer.score([rows[i] for i in kept]), strict=True))
  return [found.get(i, row) for i, row in enumerate(rows)]


@functools.lru_cache(maxsize=8)
def load(
  folder: str, *, batch: int, max_length: int, dtype: str, devices: int, fsdp: int
) -> Scorer:
  """Reads a reward model onto devices of this process; the same folder is read once.

  Args: see `reward_model`.
  """
  mesh = sharding.last_devices(devices, fsdp)
  scalar = hf.is_reward_model(folder)
  policy = pretrained(path=folder, max_length=max_length, dtype=dtype, value_head=scalar)
  tokenizer = tokenizers.huggingface(path=folder)
  if tokenizer.vocab_size > policy.config.vocab_size:
    raise ValueError(
      f'{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model '
      f'{policy.config.vocab_size}; it is the tokenizer of another model'
    )
  shapes = policy.shapes()
  with jax.set_mesh(mesh):
    shardings = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
    params = policy.init(jax.random.key(0), shardings)
  at_once = -(-batch // mesh.size) * mesh.size
  look = jit(functools.partial(last_score if scalar else last_state, policy))

  def score(rows: list[list[int]]) -> np.ndarray:
    found = np.empty(len(rows) if scalar else (len(rows), policy.config.width))
    # Rows of similar length go together, so that little padding is computed.
    order = np.argsort([len(row) for row in rows], kind='stable')
    with jax.set_mesh(mesh):
      for start in range(0, len(rows), at_once):
        piece = order[start : start + at_once]
        arrays = padded(
          [rows[i] for i in piece], at_once, tokenizer.pad_id, policy.config.max_length
        )
        scores = look(params, *(sharding.place_batch(mesh, x) for x in arrays))
        found[piece] = np.asarray(scores, np.float64)[: len(piece)]
    return found

  return Scorer(score, tokenizer, _has_template(tokenizer), policy.config.max_length)


def last_score(policy: Policy, params: Params, tokens: Array, segment_ids: Array) -> Array:
  """The scalar head at the last token of each row: i32[B, T], i32[B, T] -> f32[B]."""
  return policy.value(params, last_state(policy, params, tokens, segment_ids))


def last_state(policy: Policy, params: Params, tokens: Array, segment_ids: Array) -> Array:
  """The state of the model at the last token of each row: i32[B, T], i32[B, T] -> [B, D]."""
  hidden = policy.hidden(params, tokens, segment_ids)
  last = (segment_ids > 0).sum(axis=1) - 1
  return jax.numpy.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


@functools.lru_cache(maxsize=8)
def _layers(folder: str) -> Params:
  """The layers of the head beside a model."""
  head = bind(heads.settings(folder), objective_heads.TABLE, folder)
  width = pretrained(path=folder).config.width
  return heads.read(folder, jax.eval_shape(lambda: head.init(jax.random.key(0), width)))


def _with_user(path: str) -> tuple[str, objective_heads.LatentUser]:
  """The folder of a model with a user, with ~ expanded, and its head.

  Raises:
    FileNotFoundError: it has no config.json.
    ValueError: its model has no user.
  """
  folder = pathlib.Path(path).expanduser()
  if not (folder / 'config.json').is_file():
    raise FileNotFoundError(f'{folder}: expected the folder of a reward model, with config.json')
  if not (folder / heads.SETTINGS).is_file():
    raise ValueError(
      f'{folder} holds no reward model of users; train one with method=vpl, and write it with '
      'polgrad.convert --reward_model'
    )
  return str(folder), bind(heads.settings(folder), objective_heads.TABLE, str(folder))


def _pairs_of_users(path: str, field: str) -> dict[str, list[dict]]:
  """The labelled pairs of a file by user."""
  found = {}
  if not path:
    return found
  source = sources.jsonl(path=path)
  for row in range(len(source)):
    record = source[row]
    missing = [name for name in (field, 'chosen', 'rejected') if record.get(name) in (None, '')]
    if missing:
      raise ValueError(f'{source.place(row)}: no {missing[0]!r}, only {sorted(record)}')
    found.setdefault(str(record[field]), []).append(record)
  return found


def _row(scorer: Scorer, record: Mapping, text: str, *first: str | None) -> list[int] | Failure:
  """The ids that the model reads of a completion, or why there are none."""
  if first == (None,):
    return Failure('KeyError', 'the record has no completion that the reward model reads first')
  try:
    asked = _asked(record, scorer.chats)
    ids = batching.judged(asked, scorer.tokenizer, text, first=first[0] if first else None)
  except ValueError as error:
    return Failure('ValueError', str(error))
  if len(ids) > scorer.max_length:
    reason = f'{len(ids)} tokens, the reward model reads {scorer.max_length}'
    return Failure('TooLong', reason)
  return ids


def _asked(record: Mapping, chats: bool) -> dict:
  """The prompt as the reward model reads it: messages for a chat template, text for a model without."""
  found = {'id': record.get('id', 0)}
  if not chats:
    turns = record.get('messages') or [{'content': record['prompt']}]
    return found | {'prompt': '\n'.join(turn['content'] for turn in turns)}
  turns = record.get('messages') or [{'role': 'user', 'content': record['prompt']}]
  return found | {'messages': turns, 'tools': record.get('tools')}


def _has_template(tokenizer: Tokenizer) -> bool:
  try:
    tokenizer.chat([{'role': 'user', 'content': ''}])
  except ValueError:
    return False
  return True


def _checked(path: str) -> str:
  """The folder of a reward model, with ~ expanded.

  Raises:
    FileNotFoundError: it has no config.json.
    ValueError: it is no classifier.
  """
  folder = pathlib.Path(path).expanduser()
  if not (folder / 'config.json').is_file():
    raise FileNotFoundError(f'{folder}: expected the folder of a reward model, with config.json')
  if not hf.is_reward_model(path):
    raise ValueError(
      f'{folder} holds no reward model, but a language model; train one with method=bradley_terry, '
      'and write it with polgrad.convert --reward_model'
    )
  return str(folder)


REWARDS = either(verifiers.TABLE, table('reward_models', reward_model, user_reward_model))
SPANS = either(spans.TABLE | judge.SPANS, table('reward_models', step_model))
COMPARISONS = either(comparisons.TABLE, table('reward_models', preference_model))
Part = Annotated[Callable, REWARDS]
SpansPart = Annotated[Callable, SPANS]
ComparisonPart = Annotated[Callable, COMPARISONS]
