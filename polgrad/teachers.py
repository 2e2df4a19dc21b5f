"""Models on other devices, or behind a service, that say what they think of the tokens of a run.

    teacher=FOLDER,teacher_devices=2                        as options of a run: the last two devices
    teacher=NAME,teacher_url=http://localhost:8000/v1       a model that vLLM or polgrad serves

A function of `TABLE` makes an `Elsewhere`, which takes the place of a frozen anchor (`Phase.elsewhere`).
It is asked for what the losses of the phase read, see `GIVEN`. A whole distribution is never moved: a
model on other devices gives hidden states, which its unembedding, on the devices of the run, turns into
logits of a few tokens at a time; a service lists its likeliest tokens. The model must have the tokenizer
of the run.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import sharding
from polgrad.compiling import jit
from polgrad.data import tokenizers
from polgrad.losses import logit_stats
from polgrad.models import hf, pretrained
from polgrad.models.policy import Policy
from polgrad.models.token_stats import token_stats, unembedding
from polgrad.packing import padded
from polgrad.registry import AtLeastOne, Count, NotNegative, Positive, table
from polgrad.rewards import judge
from polgrad.rewards.worker import Failure
from polgrad.types import Array, Batch

LARGEST = 2**26  # bytes of a reply: 16 listed tokens at each place of some thousand
# What a model gives of each token, and what it is in padding. `NAME_logp` is an array of a model NAME.
GIVEN = {
  'logp': 0,  # log-prob of the token, nats
  'states': 0,  # the hidden state that predicts the token
  'top_ids': -1,  # the likeliest tokens at its place, those of the largest log-probs first
  'top_log_probs': 0,  # their log-probs, nats
}
# (rows of ids, names out of `GIVEN`, temperature) -> of each row the arrays [n - 1] or [n - 1, k] of all
# ids but the first, by name; or why it has none
Answer = dict[str, np.ndarray]
Ask = Callable[[Sequence[list[int]], frozenset[str], float], list[Answer | Failure]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Elsewhere:
  """A model that is not on the devices of the run.

  Attributes:
    ask: what it gives of some rows.
    entries: numbers that it gives of each token, by the name of the array; what it cannot give is not
      among them.
    folder: where its tokenizer is; '' is not known.
    temperature: the only one at which it gives log-probs; None: any.
    unembedding: makes logits of its `states`; None: it gives none.
  """

  ask: Ask
  entries: Mapping[str, int]
  folder: str = ''
  temperature: float | None = None
  unembedding: Policy | None = None


def entries_asked(name: str, model: Elsewhere, read: Collection[str]) -> dict[str, int]:
  """The numbers of each token that a run asks of a model, by the name of the array.

  Args:
    name: of the model.
    read: names of the arrays that the losses of the run read, such as `teacher_logp`. Where they read
      `teacher_logits`, a model `teacher` gives its states.
  """
  arrays = {f'{name}_{n}': n for n in GIVEN} | {f'{name}_logits': 'states'}
  asked = {arrays[array] for array in read if array in arrays}
  return {n: size for n, size in model.entries.items() if n in asked}


def on_devices(
  *,
  path: str,
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
  devices: Count = 1,
  fsdp: AtLeastOne = 1,
  top: AtLeastOne = 16,
) -> Elsewhere:
  """A model on the last devices of the process, which the mesh of the run should leave free.

  Its parameters are read with the first rows and stay there. Ids and what is asked for are moved for
  `batch` rows at a time.

  Args:
    path: Hugging Face folder of the model.
    batch: rows that are forwarded at once.
    max_length: tokens that a row may have; 0 is the limit of the model.
    dtype: of the computation, 'float32' or 'bfloat16'.
    devices: how many devices it runs on, counted from the last; 0 is as many as `fsdp` divides.
    fsdp: number of these devices that the parameters are cut over.
    top: likeliest tokens that are listed where a loss reads lists.

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
  unembedding = hf.unembedding(path=str(folder), dtype=dtype)
  settings = dict(batch=batch, max_length=max_length, dtype=dtype, devices=devices, fsdp=fsdp)
  top = min(top, unembedding.config.vocab_size)
  sizes = {'logp': 1, 'states': unembedding.config.width, 'top_ids': top, 'top_log_probs': top}
  return Elsewhere(
    ask=lambda *asked: _load(str(folder), top=top, **settings)(*asked),
    entries=sizes,
    folder=str(folder),
    unembedding=unembedding,
  )


@functools.lru_cache(maxsize=4)
def _load(
  folder: str, *, batch: int, max_length: int, dtype: str, devices: int, fsdp: int, top: int
) -> Ask:
  """Reads a model onto its devices; the same folder is read once."""
  mesh = sharding.last_devices(devices, fsdp)
  policy = pretrained(path=folder, max_length=max_length, dtype=dtype)
  shapes = policy.shapes()
  with jax.set_mesh(mesh):
    shardings = sharding.param_shardings(mesh, policy.axes(shapes), shapes)
    params = policy.init(jax.random.key(0), shardings)
  at_once, most = -(-batch // mesh.size) * mesh.size, policy.config.max_length
  stats = {'logp': logit_stats.logp, **likeliest(top)}

  @functools.partial(jit, static_argnames='names')
  def look(
    params: Any, tokens: Array, segment_ids: Array, temperature: Array, *, names: frozenset[str]
  ) -> dict[str, Array]:
    hidden = policy.hidden(params, tokens, segment_ids)
    unembed = unembedding(policy, params)
    wanted = {name: stats[name] for name in names & stats.keys()}
    found = {}
    if wanted:
      found = token_stats(hidden, tokens, unembed, stats=wanted, temperature=temperature)
    if 'states' in names:  # that of the token before
      found['states'] = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return found

  def ask(
    rows: Sequence[list[int]], names: frozenset[str], temperature: float
  ) -> list[Answer | Failure]:
    found = [Failure('TooLong', f'{len(row)} tokens, the model reads {most}') for row in rows]
    kept = [i for i, row in enumerate(rows) if len(row) <= most]
    # Rows of similar length go together, so that little padding is computed.
    kept.sort(key=lambda i: len(rows[i]))
    with jax.set_mesh(mesh):
      for start in range(0, len(kept), at_once):
        piece = kept[start : start + at_once]
        arrays = padded([rows[i] for i in piece], at_once, 0, most)
        placed = [sharding.place_batch(mesh, x) for x in arrays]
        said = look(params, *placed, np.float32(temperature), names=names)
        said = {name: np.asarray(x) for name, x in said.items()}
        for place, i in enumerate(piece):
          found[i] = {name: x[place, 1 : len(rows[i])] for name, x in said.items()}
    return found

  return ask


def likeliest(top: int) -> dict[str, Callable[[Array], Array]]:
  """The functions of logits [n, V] that make `top_ids` and `top_log_probs` [n, top]."""
  listed = lambda logits: jax.lax.top_k(jax.nn.log_softmax(logits), top)
  return {
    'top_ids': lambda logits: listed(logits)[1],
    'top_log_probs': lambda logits: listed(logits)[0],
  }


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
  top: AtLeastOne = 16,
) -> Elsewhere:
  """A model behind `URL/completions` with `prompt_logprobs`, as vLLM and `teacher_service` serve it.

  A row is one request: its ids are the prompt, and the reply has the log-prob of each of them, and of
  the likeliest tokens at its place if a loss reads them. Such log-probs are those at temperature 1, so a
  run that samples at another one is refused.

  Args:
    model: the name under which the endpoint serves it.
    url: of the endpoint, up to `/v1`.
    key_variable: environment variable with the key; '' for none.
    timeout_s: seconds for one try of a request.
    retries: further tries after errors that may pass.
    concurrency: requests at the same time.
    batch_s: seconds for all rows of a batch.
    largest_gap: how far above 0 a log-prob may be.
    top: likeliest tokens that are asked for where a loss reads lists; an endpoint may have a limit.
  """
  client = judge.Client(
    url=url, model=model, key_variable=key_variable, temperature=1.0, max_tokens=1,
    timeout_s=timeout_s, retries=retries, concurrency=concurrency, batch_s=batch_s, options={},
    path='/completions', name='teacher', largest=LARGEST,
  )  # fmt: skip

  def ask(
    rows: Sequence[list[int]], names: frozenset[str], temperature: float
  ) -> list[Answer | Failure]:
    del temperature  # `check` has refused all but 1
    count = top if names & {'top_ids', 'top_log_probs'} else 0
    asked = dict(model=model, max_tokens=1, temperature=1.0, prompt_logprobs=count)
    replies = client.send([asked | {'prompt': [int(i) for i in row]} for row in rows])
    return [
      x if isinstance(x, Failure) else _read(x, row, largest_gap, count)
      for row, x in zip(rows, replies, strict=True)
    ]

  sizes = {'logp': 1, 'top_ids': top, 'top_log_probs': top}
  return Elsewhere(ask=ask, entries=sizes, temperature=1.0)


def _read(reply: dict, row: Sequence[int], largest: float, top: int) -> Answer | Failure:
  """What the reply of an endpoint says of the ids of a row, and of `top` tokens at their places."""
  try:
    given = reply['choices'][0].get('prompt_logprobs') or reply['prompt_logprobs']
    if len(given) != len(row):
      return Failure('BadReply', f'{len(given)} prompt_logprobs of {len(row)} tokens')
    number = lambda x: float(x['logprob'] if isinstance(x, dict) else x)
    said = [{int(i): number(x) for i, x in entry.items()} for entry in given[1:]]
    own = np.array([entry[int(i)] for entry, i in zip(said, row[1:])], np.float32)
  except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
    reason = f'no log-prob of each id in prompt_logprobs ({type(error).__name__}: {error})'
    return Failure('BadReply', reason)
  numbers = np.array([x for entry in said for x in entry.values()])
  if not np.isfinite(numbers).all() or (numbers > largest).any():
    return Failure('BadReply', 'prompt_logprobs must be finite and at most 0')
  found = {'logp': np.minimum(own, 0)}
  if not top:
    return found
  fewest = min(map(len, said))
  if fewest < top:
    reason = f'prompt_logprobs lists {fewest} tokens at a place, but top={top} were asked for'
    return Failure('BadReply', reason)
  # The token of the row is listed too, also where it is none of the likeliest.
  likeliest = [sorted(entry, key=lambda i: (-entry[i], i))[:top] for entry in said]
  found['top_ids'] = np.array(likeliest, np.int32)
  log_probs = [[entry[i] for i in ids] for entry, ids in zip(said, likeliest)]
  found['top_log_probs'] = np.minimum(np.array(log_probs, np.float32), 0)
  mass = float(np.exp(found['top_log_probs']).sum(axis=1).max())
  if mass > 1 + 16 * largest:
    return Failure('BadReply', f'the probabilities of the listed tokens add up to {mass:.3f}')
  return found


def arrays_of(
  model: Elsewhere, name: str, batch: Batch, asked: Mapping[str, int], temperature: float
) -> dict[str, np.ndarray]:
  """What a model says of the tokens of a batch, as arrays of it.

  Args:
    name: of the model.
    batch: NumPy.
    asked: of `entries_asked`.

  Returns:
    By names such as `teacher_logp`: [B, T], or [B, T * k] of k numbers for each token. In padding, and
    at the first token of a row, they are what `GIVEN` says.

  Raises:
    RuntimeError: a row has none, for example because the endpoint did not answer in time.
  """
  seen = [np.flatnonzero(row) for row in np.asarray(batch.segment_ids)]
  used = [i for i, columns in enumerate(seen) if len(columns) > 1]
  rows = [np.asarray(batch.tokens[i])[seen[i]].tolist() for i in used]
  answers = model.ask(rows, frozenset(asked), temperature)
  failed = [x for x in answers if isinstance(x, Failure)]
  if failed:
    raise RuntimeError(
      f'the model {name!r} gave no log-probs of {len(failed)} of {len(rows)} rows, the first of them: '
      f'{failed[0].kind}: {failed[0].reason}; the run can be resumed'
    )
  found = {}
  for array, size in asked.items():
    shape = batch.tokens.shape if array == 'logp' else (*batch.tokens.shape, size)
    kind = answers[0][array].dtype if answers else np.float32
    filled = np.full(shape, GIVEN[array], kind)
    for i, answer in zip(used, answers, strict=True):
      filled[i, seen[i][1:]] = answer[array]
    found[f'{name}_{array}'] = filled.reshape(len(filled), -1)
  return found


def check(model: Elsewhere, own: tokenizers.Tokenizer, temperature: float, where: str) -> None:
  """Refuses a model with another tokenizer than that of the run, or with another temperature.

  Args:
    own: tokenizer of the run.
    temperature: at which the run samples.
    where: place of the model in the configuration, for the error.
  """
  if model.folder:
    tokenizers.check_same(own, model.folder, where)
  if model.temperature not in (None, temperature):
    raise ValueError(
      f'{where}: it gives log-probs at temperature {model.temperature:g}, but the run samples at '
      f'{temperature:g}; set collect.temperature={model.temperature:g} in the phase'
    )


def ask_first(model: Elsewhere, asked: Mapping[str, int], temperature: float, where: str) -> None:
  """Asks a service about a short row, so that a run does not begin without it.

  Args:
    asked: of `entries_asked`.
    temperature: at which the run samples.
    where: section of the configuration, for errors.

  Raises:
    ValueError: there is no service, it does not answer, or it does not give what is asked for.
  """
  if model.folder:
    return
  try:
    (answer,) = model.ask([[0, 1]], frozenset(asked), temperature)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error
  if isinstance(answer, Failure):
    raise ValueError(f'{where}: it gives no log-probs ({answer.kind}: {answer.reason})')


TABLE = table('teachers', on_devices, service)
Part = Annotated[Elsewhere, TABLE]
