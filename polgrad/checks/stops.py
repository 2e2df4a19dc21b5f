"""Which tokens end a turn, and whether a model can draw them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.checks.findings import Finding
from polgrad.data import chat
from polgrad.data.tokenizers import Tokenizer
from polgrad.models.policy import Policy
from polgrad.sharding import to_host

SAME = 8  # an output row that equals those of this number of other tokens was never trained


class Stops(NamedTuple):
  """How turns end."""

  stopping: Mapping[int, str]  # tokens that end sampling, by id; the first one ends trained rows
  opening: str  # what the generation prompt writes of the assistant's turn itself
  ending: str  # what the chat template writes after an assistant turn


def stops(tokenizer: Tokenizer) -> Stops:
  """How a tokenizer and its chat template end turns."""
  names = {i: tokenizer.name(i) for i in tokenizer.stop_ids}
  return Stops(names, tokenizer.opening, chat.ending(tokenizer.chat))


def untrained(policy: Policy, params: Any, ids: tuple[int, ...]) -> list[int]:
  """The ids whose output row is zero, or is that of `SAME` or more other tokens.

  Such a row was never trained: the model draws the token as rarely as all others of this kind. Rows are
  told apart by their logits for two random states.
  """
  if jax.process_count() > 1:
    return []
  states = np.random.default_rng(0).standard_normal((2, policy.config.width))
  logits = to_host(policy.unembed(params, jnp.asarray(states, policy.config.dtype)))
  alike = lambda i: int((logits == logits[:, i : i + 1]).all(axis=0).sum()) - 1
  return [i for i in ids if not logits[:, i].any() or alike(i) >= SAME]


def findings(tokenizer: Tokenizer, bad: list[int]) -> list[Finding]:
  """A failure if the model can draw no stop token, and a warning if it cannot draw that of the data."""
  if not bad:
    return []
  words = ', '.join(f'{tokenizer.name(i)} ({i})' for i in bad)
  text = f'the output rows of the stop tokens {words} are untrained, so the model cannot draw them'
  mend = (
    'start from a model that was tuned with this chat template, train it on demonstrations first, '
    'or name another stop token in generation_config.json'
  )
  every = len(bad) == len(tokenizer.stop_ids)
  return [Finding('config.tokenizer', text, mend, fails=every)]
