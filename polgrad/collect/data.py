"""Batches of given completions."""

import functools
from collections.abc import Callable

from polgrad.collect.base import Collected, Collector, Context, Draw, make_annotations
from polgrad.data import batching
from polgrad.sharding import to_host
from polgrad.types import TrainState


def demonstrations(*, rows: int = 32, length: int = 128) -> Collector:
  """`rows` prompts with their `answer`, each of at most `length` tokens."""
  return Collector(
    make=functools.partial(_make_data, layout=batching.supervised, length=length, records=rows),
    records=rows,
    rows=rows,
    rows_per_prompt=1,
    length=length,
    temperature=1.0,
    provides=frozenset(),
  )


def preferences(*, pairs: int = 16, length: int = 128, prompt_length: int = 0) -> Collector:
  """`pairs` prompts with a `chosen` and a `rejected` completion: two rows each, chosen first.

  Args:
    pairs: records of a batch.
    length: of a row; a longer one is an error.
    prompt_length: of these, tokens that prompts are left-padded to, so that a phase may share the
      prompts of its pairs (`share_prompts`); a longer prompt is an error. 0 pads on the right alone.
  """
  layout = functools.partial(batching.pairs, prompt_length=prompt_length)
  return Collector(
    make=functools.partial(_make_data, layout=layout, length=length, records=pairs),
    records=pairs,
    rows=2 * pairs,
    rows_per_prompt=2,
    length=length,
    prompt_length=prompt_length,
    temperature=1.0,
    provides=frozenset({'label'}),
  )


def _make_data(context: Context, *, layout: Callable, length: int, records: int) -> Callable:
  annotate = make_annotations(context, 1.0)

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    del step
    batch = layout(draw(records), context.tokenizer, length=length)
    found = annotate(state, batch.tokens, batch.segment_ids, batch.mask)
    batch = batch.replace(**found, layout=context.layout)
    metrics = {'length': float(batch.mask.sum() / len(batch.mask))}
    return Collected(batch, to_host(state.credit_state), (), metrics, [], [])

  return collect
