"""The interface between a model and everything else: pure functions of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import traverse_util

Params = Any


class Policy(NamedTuple):
  """A language model as pure functions; nothing outside `models` depends on how they are implemented.

  `B` rows, `T` positions, `S` new tokens, `D` width, `V` vocabulary. Positions count from the start
  of a token's segment, and a token sees only itself and the earlier tokens of its segment, so padding
  on either side and packing do not change the results. Segment 0 is padding; its outputs are finite and
  meaningless.

  Attributes:
    config: frozen dataclass; has at least `vocab_size`, `num_layers`, `width`, `dtype`, `max_length` and
      `value_head`.
    shapes: () -> shapes and dtypes of the parameters; reads no file.
    init: key, shardings=None -> params, a nested dict of arrays, each placed by its sharding.
    hidden: params, tokens i32[B, T], segment_ids i32[B, T] -> final hidden states [B, T, D]. It also
      reads `types.MixedTokens`. None where only the unembedding of a model is here, see
      `hf.unembedding`.
    completions: params, tokens, segment_ids, *, prompt_length, rows_per_prompt -> the columns of
      `hidden` from prompt_length - 1 on, [B, T - prompt_length + 1, D]. Requires that each row has one
      segment, and that `rows_per_prompt` consecutive rows have the same first `prompt_length` columns,
      which are then forwarded once for all these rows.
    states: params, tokens, segment_ids, *, layers -> [n, B, T, D], the residual stream behind the n
      layers whose numbers, ascending and counted from 1, are in the tuple `layers`. That of the last
      layer is `hidden`, which is normalised; the others are not. Layers behind these are not computed.
    unembed: params, hidden [..., D] -> logits f32[..., V].
    readout: params -> the part of them that `unembed` reads, which it accepts in their place.
    value: params, hidden [..., D] -> f32[...]; ValueError if the config has no value head.
    init_cache: batch, length -> an empty cache of `length` columns; every leaf has the batch axis first.
    begin: cache, shorter cache with equally many rows, rows bool[B] -> the first cache, in which the
      selected rows are replaced by those of the second cache, in the same columns; their other columns
      are emptied. The second cache has one span, and fits into the first span of the first cache.
    widen: cache, length -> the cache with a span of `length` more empty columns, which is
      not read by attention as long as all its columns are empty.
    unstack: params -> params in the form that `decode` reads; `unembed` and `value` accept this form
      too. Call it once, outside the decode loop.
    decode: unstacked params, tokens i32[B, S], positions i32[B, S], valid bool[B, S], cache, index ->
      (hidden [B, S, D], cache). Writes the tokens to columns index .. index + S - 1, those that are
      not valid as empty columns. `index` is one number, and then one span has all of these columns; or
      i32[B], a number for each row, and then what lies outside of the cache is dropped. A token sees
      every token in the cache whose position is at most its own, whatever the order of the columns.
      Prefill has S = prompt length and index 0; a step of decoding has S = 1.
    axes: params -> the same tree with a tuple of logical axis names for every array.
    labels: params, or any part of the tree -> the same tree with a label for every array that says what
      an update does to it: 'train', 'frozen' (the base of an adapter) or 'balance' (a router's bias,
      see `experts`).
    dropped: as `hidden`, or with its keywords as `completions` -> what these return, and f32[B, S]:
      which fraction of a token's experts has dropped it. None if experts have no capacity.
  """

  config: Any
  shapes: Callable
  init: Callable
  hidden: Callable
  completions: Callable
  states: Callable
  unembed: Callable
  readout: Callable
  value: Callable
  init_cache: Callable
  begin: Callable
  widen: Callable
  unstack: Callable
  decode: Callable
  axes: Callable
  labels: Callable
  dropped: Callable | None = None


def labelled(policy: Policy, tree: Params, *labels: str) -> Params:
  """The arrays that have one of the labels, as a smaller tree; `tree` holds parameters or gradients."""
  named = traverse_util.flatten_dict(policy.labels(tree))
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict({k: x for k, x in flat.items() if named[k] in labels})


def learned(policy: Policy, tree: Params) -> Params:
  """The arrays that updates change, as a smaller tree."""
  return labelled(policy, tree, 'train', 'balance')


def overlay(params: Params, part: Params) -> Params:
  """`params` with the arrays of `part` added, or replaced where both have them."""
  flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(part)
  return traverse_util.unflatten_dict(flat)
