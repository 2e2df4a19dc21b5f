"""The seam between a model and everything else: pure functions of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import traverse_util

Params = Any


class Policy(NamedTuple):
  """A language model as pure functions; nothing outside `models` knows what is behind them.

  `B` rows, `T` positions, `S` new tokens, `D` width, `V` vocabulary. Positions count from the start
  of a token's own segment and a token sees only the earlier tokens of its segment, so padding on
  either side and packing change nothing. Segment 0 is padding: its outputs are finite and mean
  nothing.

  Attributes:
    config: frozen dataclass; has at least `vocab_size`, `max_length` and `value_head`.
    shapes: () -> shapes and dtypes of the parameters; reads no file.
    init: key, shardings=None -> params, a nested dict of arrays, each where its sharding says.
    hidden: params, tokens i32[B, T], segment_ids i32[B, T] -> final hidden states [B, T, D].
    completions: params, tokens, segment_ids, *, prompt_length, group -> `hidden` from column
      prompt_length - 1 on, [B, T - prompt_length + 1, D], where every `group` rows in a line have the
      same first `prompt_length` columns, and one segment. These are forwarded once a group.
    unembed: params, hidden [..., D] -> logits f32[..., V].
    value: params, hidden [..., D] -> f32[...]; ValueError if the config has no value head.
    init_cache: batch, length -> an empty cache of `length` columns; every leaf has the batch axis first.
    begin: cache, shorter cache of as many rows, rows bool[B] -> the first cache, in which `rows` hold
      what the second one holds, in the same columns, and nothing else.
    unstack: params -> params as `decode` reads them; `unembed` and `value` take them too. Call it
      once, outside the loop.
    decode: unstacked params, tokens i32[B, S], positions i32[B, S], valid bool[B, S], cache, index ->
      (hidden [B, S, D], cache). Writes the tokens to columns index .. index + S; a token sees what the
      cache holds of positions up to its own, in any order. S = Tp at index 0 is the prefill, S = 1 a
      step.
    axes: params -> the same tree with the logical axis names of every array.
    labels: params -> the same tree with what an update does to every array: 'train', 'frozen' (the
      base of an adapter) or 'balance' (a router's bias, see `experts`); parts of the tree will do.
  """

  config: Any
  shapes: Callable
  init: Callable
  hidden: Callable
  completions: Callable
  unembed: Callable
  value: Callable
  init_cache: Callable
  begin: Callable
  unstack: Callable
  decode: Callable
  axes: Callable
  labels: Callable


def labelled(policy: Policy, tree: Params, *labels: str) -> Params:
  """The part of the parameters (or of gradients like them) that has one of the labels.

  The rest is not in the tree.
  """
  named = traverse_util.flatten_dict(policy.labels(tree))
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict({k: x for k, x in flat.items() if named[k] in labels})


def learned(policy: Policy, tree: Params) -> Params:
  """The part of the parameters that updates change."""
  return labelled(policy, tree, 'train', 'balance')


def overlay(params: Params, part: Params) -> Params:
  """`params` with the arrays of `part` in their places."""
  flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(part)
  return traverse_util.unflatten_dict(flat)
