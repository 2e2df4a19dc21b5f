"""The seam between a model and everything else: pure functions of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Policy(NamedTuple):
  """A language model as pure functions; nothing outside `models` knows what is behind them.

  `B` rows, `T` positions, `S` new tokens, `D` width, `V` vocabulary. Positions count from the start
  of a token's own segment and a token sees only the earlier tokens of its segment, so padding on
  either side and packing change nothing. Segment 0 is padding: its outputs are finite and mean
  nothing.

  Attributes:
    config: frozen dataclass; has at least `vocab_size`, `max_length` and `value_head`.
    init: key -> params, a nested dict of arrays.
    hidden: params, tokens i32[B, T], segment_ids i32[B, T] -> final hidden states [B, T, D].
    unembed: params, hidden [..., D] -> logits f32[..., V].
    value: params, hidden [..., D] -> f32[...]; ValueError if the config has no value head.
    init_cache: batch, length -> an empty cache; every leaf has the batch axis first.
    unstack: params -> params as `decode` reads them; `unembed` and `value` take them too. Call it
      once, outside the loop.
    decode: unstacked params, tokens i32[B, S], positions i32[B, S], valid bool[B, S], cache, index ->
      (hidden [B, S, D], cache). Writes the tokens to slots index .. index + S; a token sees the
      valid slots up to its own. S = Tp at index 0 is the prefill, S = 1 a step.
    axes: params -> the same tree with the logical axis names of every array.
  """

  config: Any
  init: Callable
  hidden: Callable
  unembed: Callable
  value: Callable
  init_cache: Callable
  unstack: Callable
  decode: Callable
  axes: Callable
