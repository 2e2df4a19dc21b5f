"""Models that give a run log-probs of tokens from other devices, or from behind a service.

    teacher=FOLDER,teacher_devices=2                        as options of a run: the last two devices
    teacher=NAME,teacher_url=http://localhost:8000/v1       a model that vLLM serves

A function of `TABLE` makes a function from rows of ids to the log-probs of all ids but the first of
each. It takes the place of a frozen anchor where only log-probs are read (`Phase.elsewhere`). The model
must have the tokenizer of the run.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from polgrad import sharding
from polgrad.compiling import jit
from polgrad.data import tokenizers
from polgrad.losses import logit_stats
from polgrad.models import hf, pretrained
from polgrad.models.token_stats import token_stats
from polgrad.packing import padded
from polgrad.registry import AtLeastOne, Count, NotNegative, Positive, table
from polgrad.rewards import judge
from polgrad.rewards.worker import Failure
from polgrad.types import Array, Batch

# (rows of ids, temperature) -> log-probs f32[n - 1] of each row, or why it has none
Score = Callable[[Sequence[list[int]], float], list[np.ndarray | Failure]]


def on_devices(
  *,
  path: str,
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
  devices: Count = 1,
  fsdp: AtLeastOne = 1,
) -> Score:
  """A model on the last devices of the process, which the mesh of the run should leave free.

  Its parameters are read with the first rows and stay there; only ids and log-probs move.

  Args:
    path: Hugging Face folder of the model.
    batch: rows that are forwarded at once.
    max_length: tokens that a row may have; 0 is the limit of the model.
    dtype: of the computation, 'float32' or 'bfloat16'.
    devices: how many devices it runs on, counted from the last; 0 is as many as `fsdp` divides.
    fsdp: number of these devices that the parameters are cut over.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: a folder that holds a reward model, or more devices than there are.
  """
  folder = pathlib.Path(path).expanduser()
  if not (folder / 'config.json').is_file():
    raise FileNotFoundError(f'{folder}: expected the folder of a model, with config.json')
  if hf.is_reward_model(str(folder)):
    raise ValueError(f'{folder} holds a reward model, which has no distribution over tokens')
  sharding.last_devices(devices, fsdp)  # refuses what does not fit
  settings = dict(batch=batch, max_length=max_length, dtype=dtype, devices=devices, fsdp=fsdp)

  def score(rows: Sequence[list[int]], temperature: float) -> list[np.ndarray | Failure]:
    return _load(str(folder), **settings)(rows, temperature)

  score.folder = str(folder)
  score.__qualname__ = 'on_devices'
  return score


@functools.lru_cache(maxsize=4)
def _load(
  folder: str, *, batch: int, max_length: int, dtype: str, devices: int, fsdp: int
) -> Score:
  """Reads a model onto its devices; the same folder is read once."""
  mesh = sharding.last_devices(devices, fsdp)
  policy = pretrained(path=folder, max_length=max_length, dtype=dtype)
  shapes = policy.shapes()
  with jax.set_mesh(mesh):
    shardings = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
    params = policy.init(jax.random.key(0), shardings)
  at_once, most = -(-batch // mesh.size) * mesh.size, policy.config.max_length

  @jit
  def look(params: Any, tokens: Array, segment_ids: Array, temperature: Array) -> Array:
    hidden = policy.hidden(params, tokens, segment_ids)
    unembed = functools.partial(policy.unembed, params)
    stats = {'logp': logit_stats.logp}
    return token_stats(hidden, tokens, unembed, stats=stats, temperature=temperature)['logp']

  def score(rows: Sequence[list[int]], temperature: float) -> list[np.ndarray | Failure]:
    found = [Failure('TooLong', f'{len(row)} tokens, the model reads {most}') for row in rows]
    kept = [i for i, row in enumerate(rows) if len(row) <= most]
    # Rows of similar length go together, so that little padding is computed.
    kept.sort(key=lambda i: len(rows[i]))
    with jax.set_mesh(mesh):
      for start in range(0, len(kept), at_once):
        piece = kept[start : start + at_once]
        arrays = padded([rows[i] for i in piece], at_once, 0, most)
        placed = [sharding.place_batch(mesh, x) for x in arrays]
        logp = np.asarray(look(params, *placed, np.float32(temperature)))
        for i, x in zip(piece, logp):
          found[i] = x[1 : len(rows[i])]
    return found

  return score


def service(
  *,
  model: str,
  url: str = 'http://localhost:8000/v1',
  key_variable: str = '',
  timeout_s: Positive = 120.0,
  retries: Count = 4,
  concurrency: AtLeastOne = 8,
  batch_s: Positive = 1200.0,
  largest_gap: NotNegative = 1e-3,
) -> Score:
  """A model behind `URL/completions` with `prompt_logprobs`, as vLLM serves it.

  A row is one request: its ids are the prompt, and the reply has the log-prob of each of them. Such
  log-probs are those at temperature 1, so a run that samples at another one is refused.

  Args:
    model: the name under which the endpoint serves it.
    url: of the endpoint, up to `/v1`.
    key_variable: environment variable with the key; '' for none.
    timeout_s: seconds for one try of a request.
    retries: further tries after errors that may pass.
    concurrency: requests at the same time.
    batch_s: seconds for all rows of a batch.
    largest_gap: how far above 0 a log-prob may be.
  """
  client = judge.Client(
    url=url, model=model, key_variable=key_variable, temperature=1.0, max_tokens=1,
    timeout_s=timeout_s, retries=retries, concurrency=concurrency, batch_s=batch_s, options={},
    path='/completions', name='teacher',
  )  # fmt: skip

  def score(rows: Sequence[list[int]], temperature: float) -> list[np.ndarray | Failure]:
    del temperature  # `check` has refused all but 1
    asked = dict(model=model, max_tokens=1, temperature=1.0, prompt_logprobs=0)
    replies = client.send([asked | {'prompt': [int(i) for i in row]} for row in rows])
    return [
      x if isinstance(x, Failure) else _logp_of(x, row, largest_gap)
      for row, x in zip(rows, replies, strict=True)
    ]

  score.temperature = 1.0
  score.__qualname__ = 'service'
  return score


def _logp_of(reply: dict, row: Sequence[int], largest: float) -> np.ndarray | Failure:
  """The log-probs f32[n - 1] of the ids of a row in the reply of an endpoint."""
  try:
    given = reply['choices'][0].get('prompt_logprobs') or reply['prompt_logprobs']
    if len(given) != len(row):
      return Failure('BadReply', f'{len(given)} prompt_logprobs of {len(row)} tokens')
    found = [entry[str(i)] for entry, i in zip(given[1:], row[1:])]
    numbers = np.array([x['logprob'] if isinstance(x, dict) else x for x in found], np.float32)
  except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
    reason = f'no log-prob of each id in prompt_logprobs ({type(error).__name__}: {error})'
    return Failure('BadReply', reason)
  if not np.isfinite(numbers).all() or (numbers > largest).any():
    return Failure('BadReply', 'prompt_logprobs must be finite and at most 0')
  return np.minimum(numbers, 0)


def batch_logp(score: Score, name: str, batch: Batch, temperature: float) -> np.ndarray:
  """The log-probs f32[B, T] of the tokens of a batch (NumPy), 0 in padding.

  Args:
    score: of `TABLE`.
    name: what the model is for, for errors.

  Raises:
    RuntimeError: a row has no log-probs, for example because the endpoint did not answer in time.
  """
  seen = [np.flatnonzero(row) for row in np.asarray(batch.segment_ids)]
  used = [i for i, columns in enumerate(seen) if len(columns) > 1]
  rows = [np.asarray(batch.tokens[i])[seen[i]].tolist() for i in used]
  found = np.zeros(batch.tokens.shape, np.float32)
  answers = score(rows, temperature)
  failed = [x for x in answers if isinstance(x, Failure)]
  if failed:
    raise RuntimeError(
      f'the model {name!r} gave no log-probs of {len(failed)} of {len(rows)} rows, the first of them: '
      f'{failed[0].kind}: {failed[0].reason}; the run can be resumed'
    )
  for i, logp in zip(used, answers, strict=True):
    found[i, seen[i][1:]] = logp
  return found


def check(score: Score, own: tokenizers.Tokenizer, temperature: float, where: str) -> None:
  """Refuses a model with another tokenizer than that of the run, or with another temperature.

  Args:
    score: of `TABLE`. The tokenizer is compared if it has the attribute `folder`, and the temperature
      if it has `temperature`.
    own: tokenizer of the run.
    temperature: at which the run samples.
    where: place of the model in the configuration, for the error.
  """
  if folder := getattr(score, 'folder', ''):
    tokenizers.check_same(own, folder, where)
  only = getattr(score, 'temperature', None)
  if only not in (None, temperature):
    raise ValueError(
      f'{where}: it gives log-probs at temperature {only:g}, but the run samples at {temperature:g}; '
      f'set collect.temperature={only:g} in the phase'
    )


def ask_first(score: Score, temperature: float, where: str) -> None:
  """Asks a service about a short row, so that a run does not begin without it.

  Args:
    temperature: at which the run samples.
    where: section of the configuration, for errors.

  Raises:
    ValueError: there is no service, it does not answer, or it gives no log-probs of a prompt.
  """
  if getattr(score, 'folder', ''):
    return
  try:
    (answer,) = score([[0, 1]], temperature)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error
  if isinstance(answer, Failure):
    raise ValueError(f'{where}: it gives no log-probs ({answer.kind}: {answer.reason})')


TABLE = table('teachers', on_devices, service)
Part = Annotated[Callable, TABLE]
