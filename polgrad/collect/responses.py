"""The last response to every data row, and how far the policy has moved on it since (arXiv:2509.13232).

A curriculum whose `reads` has 'drift' learns of this distance. The responses are `TrainState.responses`:
NumPy arrays with an entry for each data row, on the host alone and in every checkpoint.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from polgrad import speed
from polgrad.collect.base import Annotator, Context
from polgrad.compiling import jit
from polgrad.curricula.base import from_policy
from polgrad.learner import forward_in_pieces
from polgrad.types import Array, Batch, Outputs, Params, TrainState


class Responses(NamedTuple):
  """A response to each of D data rows, as a row of T positions with its prompt."""

  tokens: np.ndarray  # i32[D, T]
  segment_ids: np.ndarray  # i32[D, T], 0 is padding
  mask: np.ndarray  # bool[D, T], tokens of the response; nowhere True: there is none yet
  logp: np.ndarray  # f32[D, T], under the policy after the updates of the step that drew it, nats


def empty(rows: int, length: int) -> Responses:
  """No responses to `rows` data rows, with room for `length` positions each."""
  blank = lambda dtype: np.zeros((rows, length), dtype)
  return Responses(blank(np.int32), blank(np.int32), blank(bool), blank(np.float32))


def recalled(store: Responses, batch: Batch) -> Batch:
  """For each row of a batch (NumPy) the stored response to its data row, or itself if there is none."""
  there = store.mask[batch.prompt_ids].any(axis=1)[:, None]
  take = lambda own, kept: np.where(there, kept[batch.prompt_ids], own)
  return Batch(
    tokens=take(batch.tokens, store.tokens),
    segment_ids=take(batch.segment_ids, store.segment_ids),
    mask=take(batch.mask, store.mask),
  )


def drift(store: Responses, rows: np.ndarray, logp: np.ndarray) -> np.ndarray:
  """The mean over the stored response of |log pi now - log pi then|, f32[B], nats; 0 without one.

  Args:
    store: from before the step.
    rows: i32[B], data row of each row.
    logp: f32[B, T], of these responses now; what is not in the mask of the store is not read.
  """
  mask = store.mask[rows]
  gap = np.where(mask, np.abs(logp - store.logp[rows]), 0.0).sum(axis=1)
  return (gap / np.maximum(mask.sum(axis=1), 1)).astype(np.float32)


def stored(store: Responses, batch: Batch, logp: np.ndarray) -> Responses:
  """The store with the rows of a batch (NumPy) in the place of earlier responses to their data rows.

  Of several rows of one prompt the last one that the policy sampled is kept. Answers of the data, which
  may be those of other prompts, and rows without tokens in their mask are not stored. The arrays are
  changed in place, since copying the responses to all data rows would cost more than the rest; a
  checkpoint that is being written has its own copy.

  Args:
    logp: f32[B, T], of the rows after the updates on them.
  """
  usable = np.flatnonzero(batch.mask.any(axis=1) & from_policy(batch))[::-1]
  rows, first = np.unique(batch.prompt_ids[usable], return_index=True)
  own = usable[first]

  def put(kept, x):
    kept = kept if kept.flags.writeable else kept.copy()
    kept[rows] = x[own]
    return kept

  new = (batch.tokens, batch.segment_ids, batch.mask, np.where(batch.mask, logp, 0.0))
  return Responses(*map(put, store, new))


Recall = Callable[[TrainState, Batch, speed.Meter], tuple[np.ndarray, Responses]]


def make_recall(context: Context, temperature: float) -> Recall:
  """Compiles the measurement of a step.

  Args:
    temperature: divides all logits, as it did when the rows were sampled.

  Returns:
    (state after the updates of the step, batch (NumPy), meter) -> (`drift` f32[B], the next responses).
    Seconds and operations of its forward passes are the part `drift` of the meter.
  """

  def of_policy(params: Params, batch: Batch, teacher: Params | None) -> Outputs:
    del teacher
    settings = dict(temperature=temperature, micro_batches=context.micro_batches)
    return forward_in_pieces(context.policy, params, batch, **settings)

  forward = Annotator(
    context=context,
    own=frozenset({'proximal_logp'}),
    stats=frozenset(),
    of_policy=jit(of_policy),
    reads_teacher=False,
    of_anchor={},
  )

  def logp(state: TrainState, batch: Batch, meter: speed.Meter) -> Array:
    rows = Batch(tokens=batch.tokens, segment_ids=batch.segment_ids, mask=batch.mask)
    meter.add('drift', forward.flops(rows))
    return forward(state, rows).proximal_logp

  def recall(state: TrainState, batch: Batch, meter: speed.Meter) -> tuple[np.ndarray, Responses]:
    store, rows = state.responses, batch.prompt_ids
    with meter.timing('drift'):
      moved = np.zeros(len(rows), np.float32)
      if store.mask[rows].any():  # in the first steps there is nothing to compare with
        moved = drift(store, rows, logp(state, recalled(store, batch), meter))
      return moved, stored(store, batch, logp(state, batch, meter))

  return recall
