"""Texts that end a completion, found token by token inside the compiled decode loop.

The stop strings become one automaton that reads bytes: its state is how much of a stop string the text
ends with (Aho and Corasick, 1975). Reading a token means reading its bytes, so a table says for each
state and token which state comes next, and a row of the sampler carries a single number. The table is
exact for strings that begin or end inside a token, lie within one, or span several, and for characters
of several bytes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polgrad.data.stops import before as before
from polgrad.data.stops import through as through
from polgrad.data.tokenizers import Tokenizer
from polgrad.models.policy import Policy

LARGEST = 253  # bytes of all stop strings, so that states fit into 8 bits


class StopTable(NamedTuple):
  """The automaton of some stop strings over the tokens of a vocabulary."""

  following: np.ndarray  # u8[states, V], the state after a token
  start: int  # state of a row without tokens
  end: int  # state of a row whose text contains a stop string; it is never left


def check(strings: Sequence[str]) -> None:
  """Refuses stop strings that are no texts, empty, or too long in sum.

  Raises:
    ValueError: names the string.
  """
  for text in strings:
    if not isinstance(text, str) or not text or '\ufffd' in text:
      raise ValueError(f'stop_strings: expected texts that are not empty, got {text!r}')
  total = sum(len(text.encode()) for text in strings)
  if total > LARGEST:
    raise ValueError(f'stop_strings: {total} bytes in all, more than {LARGEST}')


def for_policy(tokenizer: Tokenizer, policy: Policy) -> StopTable | None:
  """The table of the tokenizer's stop strings over the policy's vocabulary, None if it has none."""
  return stop_table(tokenizer, policy.config.vocab_size) if tokenizer.stop_strings else None


@functools.lru_cache(maxsize=4)  # it is made once for a check, and once for each sampler
def stop_table(tokenizer: Tokenizer, size: int) -> StopTable:
  """The table of the tokenizer's stop strings.

  Args:
    size: tokens of the model's vocabulary; those that the tokenizer lacks have no text.

  Raises:
    ValueError: stop strings that `check` refuses, or a tokenizer whose tokens are no bytes.
  """
  strings = tokenizer.stop_strings
  check(strings)
  if tokenizer.pieces is None:
    raise ValueError('stop_strings: the bytes of single tokens are unknown for this tokenizer')
  moves = _automaton([text.encode() for text in strings])
  end, start = len(moves) - 1, len(moves)
  following = np.zeros((start + 1, size), np.uint8)
  following[:start] = _read(moves, tokenizer.pieces(False), size, range(start))
  # The first token may lose a space. A token without any text leaves the row at its start.
  following[start] = _read(moves, tokenizer.pieces(True), size, [0])[0]
  silent = [i for i, piece in enumerate(tokenizer.pieces(False)) if not piece]
  following[start, [*silent, *range(len(tokenizer.pieces(False)), size)]] = start
  return StopTable(following, start, end)


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
  """u8[states, 256]: the state after a byte. State 0 is the first one, the last one is the end."""
  # A tree of the beginnings of all strings; `ends` are the nodes at which one is complete.
  children, ends = [{}], set()
  for string in strings:
    node = 0
    for byte in string:
      if byte not in children[node]:
        children[node][byte] = len(children)
        children.append({})
      node = children[node][byte]
    ends.add(node)
  # Level by level: where a node has no child, the move is that of its longest proper ending.
  moves = np.zeros((len(children) + 1, 256), np.uint8)
  shorter, level = {0: 0}, [0]
  while level:
    for node in level:
      if node:
        moves[node] = moves[shorter[node]]
      for byte, child in children[node].items():
        shorter[child] = int(moves[node, byte]) if node else 0
        moves[node, byte] = child
        if shorter[child] in ends:
          ends.add(child)
    level = [child for node in level for child in children[node].values()]
  # One end, which is never left, in the place of all.
  end = len(children)
  moves = np.where(np.isin(moves, list(ends)), np.uint8(end), moves)
  moves[[*ends, end]] = end
  return moves


def _read(
  moves: np.ndarray, pieces: Sequence[bytes], size: int, states: Sequence[int]
) -> np.ndarray:
  """u8[len(states), size]: the state after all bytes of a token, for each of these states."""
  order = np.argsort([-len(piece) for piece in pieces], kind='stable')
  lengths = np.array([len(pieces[i]) for i in order])
  now = np.repeat(np.asarray(states, np.uint8)[:, None], len(pieces), axis=1)
  # Byte by byte, of the tokens that are that long: the first ones of the order.
  for place in range(int(lengths.max(initial=0))):
    count = int(np.sum(lengths > place))
    bytes_here = np.array([pieces[i][place] for i in order[:count]])
    now[:, :count] = moves[now[:, :count], bytes_here[None]]
  out = np.repeat(np.asarray(states, np.uint8)[:, None], size, axis=1)
  out[:, order] = now
  return out
