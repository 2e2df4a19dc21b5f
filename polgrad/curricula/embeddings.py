"""Embeddings of prompts, for curricula that compare prompts: records -> f32[n, E], rows of length 1."""

import collections
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import jax
import numpy as np

from polgrad import sharding
from polgrad.compiling import jit
from polgrad.data import batching, tokenizers
from polgrad.losses.embedding_rewards import mean_pooled
from polgrad.models import Policy, pretrained
from polgrad.registry import AtLeastOne, Count, Range, table
from polgrad.types import Array, Params

Embed = Callable[[Sequence[Mapping]], np.ndarray]
SHORTEST = 32  # columns of the shortest rows; other lengths are these times a power of two


def character_ngrams(
  *, size: Annotated[int, Range(at_least=2)] = 256, longest: AtLeastOne = 3
) -> Embed:
  """Counts of the character sequences of a prompt, hashed to `size` numbers; needs no model.

  A sequence adds 1 or -1 to the number that its CRC-32 names. So does each of the first 64 characters
  with its position, so that `12+34=` and `34+12=` differ.

  Args:
    size: E.
    longest: characters of the longest sequences.
  """

  def embed(records: Sequence[Mapping]) -> np.ndarray:
    found = np.zeros((len(records), size), np.float32)
    for row, record in zip(found, records, strict=True):
      for piece, times in _pieces(text_of(record), longest).items():
        number = zlib.crc32(piece.encode())
        row[(number >> 1) % size] += times * (1 - 2 * (number & 1))
    return _unit(found)

  return embed


def _pieces(text: str, longest: int) -> collections.Counter:
  """The sequences of 1 to `longest` characters, and each character with its position."""
  pieces = (text[i : i + n] for n in range(1, longest + 1) for i in range(len(text) - n + 1))
  placed = (f'{i} {character}' for i, character in enumerate(text[:64]))
  return collections.Counter([*pieces, *placed])


def states(
  *,
  path: str,
  pooling: Literal['mean', 'last'] = 'mean',
  batch: AtLeastOne = 16,
  max_length: Count = 0,
  dtype: str = 'float32',
) -> Embed:
  """The states behind the last layer of a frozen model at the tokens of a prompt, pooled.

  Take the folder of the run's model for states of the policy before training, or that of an embedding
  model. Parameters are read with the first prompts. Each process of a pod has a copy, on one device.

  Args:
    path: Hugging Face folder, whose tokenizer and chat template are used.
    pooling: 'mean' of all tokens or the 'last' one.
    batch: rows that are forwarded at once.
    max_length: tokens of a prompt that are read, the last ones; 0 is the limit of the model.
    dtype: of the computation, 'float32' or 'bfloat16'.

  Raises:
    FileNotFoundError, ValueError: the folder or one of its files is missing or wrong.
  """
  pretrained(path=path, max_length=max_length, dtype=dtype)  # refuses what is no model before a run
  settings = dict(pooling=pooling, batch=batch, max_length=max_length, dtype=dtype)
  return lambda records: _embedder(path, **settings)(records)


@functools.lru_cache(maxsize=2)
def _embedder(path: str, *, pooling: str, batch: int, max_length: int, dtype: str) -> Embed:
  """Reads the model, and compiles its forward pass."""
  policy = pretrained(path=path, max_length=max_length, dtype=dtype)
  tokenizer = tokenizers.huggingface(path=path)
  mesh = sharding.last_devices(1, 1)
  shapes = policy.shapes()
  with jax.set_mesh(mesh):
    params = policy.init(
      jax.random.key(0), sharding.param_shardings(mesh, policy.axes(shapes), shapes)
    )
  look = jit(functools.partial(_pooled, policy, pooling=pooling))
  longest = policy.config.max_length

  def embed(records: Sequence[Mapping]) -> np.ndarray:
    found = np.zeros((len(records), policy.config.width), np.float32)
    order = np.argsort([len(text_of(record)) for record in records], kind='stable')
    for start in range(0, len(order), batch):
      piece = [records[i] | {'id': 0} for i in order[start : start + batch]]
      piece += [piece[-1]] * (batch - len(piece))
      laid = batching.prompts(piece, tokenizer, length=longest, cut=True)
      # Columns that are padding in all rows are left out.
      columns = max(int(laid.mask.sum(axis=1).max()), 1)
      columns = min(SHORTEST * 2 ** max((-(-columns // SHORTEST) - 1).bit_length(), 0), longest)
      with jax.set_mesh(mesh):
        rows = look(params, laid.tokens[:, -columns:], laid.mask[:, -columns:])
      found[order[start : start + batch]] = np.asarray(rows)[: len(order) - start]
    return found

  return embed


def _pooled(policy: Policy, params: Params, tokens: Array, mask: Array, *, pooling: str) -> Array:
  hidden = policy.hidden(params, tokens, mask.astype(np.int32))
  # Prompts are left-padded, so their last token is in the last column.
  last = (np.arange(mask.shape[1]) == mask.shape[1] - 1)[None]
  where = mask if pooling == 'mean' else mask & last
  return mean_pooled(hidden, where)


def text_of(record: Mapping) -> str:
  """The prompt of a record, or its turns one after the other."""
  if 'prompt' in record:
    return record['prompt']
  return '\n'.join(str(turn.get('content', '')) for turn in record['messages'])


def _unit(rows: np.ndarray) -> np.ndarray:
  length = np.linalg.norm(rows, axis=-1, keepdims=True)
  return rows / np.where(length > 0, length, 1)


TABLE = table('embeddings', character_ngrams, states)
Part = Annotated[Embed, TABLE]
