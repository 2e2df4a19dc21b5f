"""Decoding token by token for someone who reads along, with a cache that stays between prompts.

`Streamer` draws the same tokens as the sampler of `make_sampler`, but gives each one away as soon as it
is drawn. `Text` makes text of them, in which no character is ever broken.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.compiling import jit
from polgrad.models.policy import Policy
from polgrad.sampling import behavior_policies, stopping
from polgrad.sampling.decoding import categorical
from polgrad.sampling.sampler import behavior_at, chosen_processors
from polgrad.types import Array, Params

CHUNK = 64  # tokens of a prompt that are read at once
SMALLEST = 256  # columns of the first cache; the next one has twice as many, and so on
AHEAD = 128  # columns that are free when an answer begins, so that most need no larger cache
BROKEN = '\N{REPLACEMENT CHARACTER}'  # what a tokenizer writes for a part of a character


class Reading(NamedTuple):
  """What the model has read, from which the next token is drawn."""

  hidden: dict[str, Array]  # [D] by model: final hidden state of the last token
  cache: dict[str, Any]  # keys and values by model; a token's column is its position


class Streamer:
  """Draws one completion at a time, token by token.

  Of a prompt that begins like what was read last (the conversation so far), only the rest is read.
  Programs are compiled for a cache of a fixed size, whose columns all cost time, used or not. So it
  begins small, and its size doubles when a conversation outgrows it.
  """

  def __init__(
    self,
    policy: Policy,
    params: Params,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    scorer: tuple[Policy, Params] | None = None,
    strength: float = 1.0,
    note: Callable[[str], None] = lambda text: None,
  ):
    """Prepares the parameters for decoding.

    Args:
      policy, params: the model.
      temperature: divides the logits; 0 is greedy.
      top_k, top_p: see `make_sampler`.
      stop_ids: tokens that end a completion.
      scorer: a model of the same vocabulary whose logits are values, which steers the decoding, see
        `behavior_policies.controlled`; None: nothing does.
      strength: of the scorer, in 1 / unit of its values.
      note: is called with a line of text before something that takes time.
    """
    self._stops, self._note = frozenset(stop_ids), note
    self._models = {'policy': policy} | ({'scorer': scorer[0]} if scorer else {})
    self._strength = strength
    self._limit = min(model.config.max_length for model in self._models.values())
    self._behavior, temperature = behavior_at(temperature)
    self._processors = chosen_processors(temperature, top_k, top_p)
    given = {'policy': params} | ({'scorer': scorer[1]} if scorer else {})
    self._params = {name: jit(model.unstack)(given[name]) for name, model in self._models.items()}
    self._read = jit(self._read_chunk, donate_argnums=3)
    self._step = jit(self._draw, donate_argnums=2)
    self._grow = jit(self._larger, static_argnames='size')
    self._tokens: list[int] = []  # what the cache holds, by column
    self._cache: Any = None
    self._size = 0

  def __call__(
    self, prompt: Sequence[int], *, max_new_tokens: int, seed: int, turn: int
  ) -> Iterator[int]:
    """Yields the tokens of a completion; a stop token is the last one.

    Without a stop token it ends after `max_new_tokens`, or where the model can read no more.

    Args:
      prompt: its ids, at least one.
      seed, turn: seed the noise, as seed, step and prompt id do in `make_sampler`.

    Raises:
      ValueError: the prompt leaves no room for a token.
    """
    limit = self._limit
    if len(prompt) >= limit:
      raise ValueError(f'a prompt of {len(prompt)} tokens: the model reads {limit} with the answer')
    end = min(len(prompt) + max_new_tokens, limit)
    self._make_room(min(end, len(prompt) + AHEAD))
    reading = self._read_prompt(list(prompt))
    key = jax.random.fold_in(jax.random.key(seed), turn)
    key = jax.random.fold_in(jax.random.fold_in(key, turn), 0)
    for made in range(end - len(prompt)):
      place = len(self._tokens)
      if self._make_room(place + 1):
        reading = reading._replace(cache=self._cache)
      token, reading = self._step(self._params, key, reading, np.int32(made), np.int32(place))
      self._cache = reading.cache
      self._tokens.append(int(token))
      yield self._tokens[-1]
      if self._tokens[-1] in self._stops:
        return

  def _make_room(self, columns: int) -> bool:
    """Makes a cache of at least that number of columns, which keeps what was read; whether it is new."""
    size = max(self._size, min(SMALLEST, self._limit))
    while size < columns:
      size = min(2 * size, self._limit)
    grown = size != self._size
    if grown:
      self._note(f'compiling for conversations of up to {size} tokens ...')
      self._cache = self._grow(self._cache, size=size)
      self._size = size
    return grown

  def _larger(self, cache: Any, *, size: int) -> Any:
    new = {name: model.init_cache(1, size) for name, model in self._models.items()}
    if cache is None:
      return new
    grow = lambda name, model: model.begin(new[name], cache[name], jnp.ones(1, bool))
    return {name: grow(name, model) for name, model in self._models.items()}

  def _read_prompt(self, prompt: list[int]) -> Reading:
    """Reads what the cache does not hold yet, at least the last token.

    What the cache holds behind the common part has later positions than what is read now, so it is not
    looked at until it is overwritten.
    """
    pairs = zip(prompt[:-1], self._tokens)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    start = min(len(prompt) - 1, len(self._tokens)) if start is None else start
    chunk = min(CHUNK, self._size)
    while start < len(prompt):
      start = min(start, self._size - chunk)  # a chunk that would not fit begins earlier
      piece = prompt[start : start + chunk]
      tokens = np.zeros(chunk, np.int32)
      tokens[: len(piece)] = piece
      count = np.int32(len(piece))
      reading = self._read(self._params, tokens, count, self._cache, np.int32(start))
      self._cache = reading.cache
      start += len(piece)
    self._tokens = prompt
    return reading

  def _read_chunk(self, params, tokens, count, cache, start) -> Reading:
    """Reads the first `count` of tokens i32[CHUNK] into the columns from `start` on."""
    place = jnp.arange(len(tokens))
    given = (tokens[None], (start + place)[None], (place < count)[None])
    return self._decode(params, *given, cache, start, column=count - 1)

  def _draw(self, params, key, reading, made, place) -> tuple[Array, Reading]:
    """Draws token number `made` of a completion, and reads it at `place`."""
    logits = {
      name: model.unembed(params[name], reading.hidden[name][None])
      for name, model in self._models.items()
    }
    chosen = logits['policy']
    if 'scorer' in logits:
      chosen = behavior_policies.controlled(chosen, logits['scorer'], strength=self._strength)
    logits = self._behavior(chosen)
    for processor in self._processors:
      logits = processor(logits)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    token = categorical(key[None], made[None], log_probs)
    given = (token[None], place[None, None], jnp.ones((1, 1), bool))
    return token[0], self._decode(params, *given, reading.cache, place, column=0)

  def _decode(self, params, tokens, positions, valid, cache, index, *, column) -> Reading:
    """Lets all models read the tokens [1, S]; the hidden states are those of `column`."""
    hidden, caches = {}, {}
    for name, model in self._models.items():
      states, caches[name] = model.decode(
        params[name], tokens, positions, valid, cache[name], index
      )
      hidden[name] = states[0, column]
    return Reading(hidden, caches)


class Text:
  """The text of tokens that come one by one.

  A text is only given away when later tokens cannot change it: not while its last character may be
  incomplete, and not while its end may begin a stop string.

  >>> text = Text(lambda ids: bytes(ids).decode(errors='replace'), ['END'])
  >>> [text.add(byte) for byte in 'aé'.encode()], [text.add(byte) for byte in b' EE']
  (['a', '', 'é'], [' ', '', 'E'])
  >>> [text.add(byte) for byte in b'NDx'], text.ended
  (['', '', ''], True)
  """

  def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
    """Begins with no text.

    Args:
      decode: ids -> text.
      stops: strings that end the text; they are not part of it.
    """
    self._decode, self._stops = decode, [stop for stop in stops if stop]
    self._ids: list[int] = []
    self._given = ''
    self.ended = False  # whether a stop string has come

  def add(self, token: int) -> str:
    """The text that can be given away after one more token."""
    self._ids.append(token)
    return self._give(self._decode(self._ids).rstrip(BROKEN), last=False)

  def close(self) -> str:
    """What is left when no more tokens come."""
    return self._give(self._decode(self._ids), last=True)

  def _give(self, text: str, last: bool) -> str:
    if self.ended:
      return ''
    sure = len(stopping.before(text, self._stops))
    self.ended = sure < len(text)
    if not self.ended and not last:
      # The longest end of the text that begins a stop string is kept back.
      sure -= max(
        (n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0
      )
    new = text[len(self._given) : sure] if text.startswith(self._given) else ''
    self._given += new
    return new
