"""The arrays that flow through polgrad.

`N` prompts, `G` samples each, `B = N * G` rows prompt-major, `T` positions, `V` vocabulary.

One convention holds everywhere: `x[b, t]` belongs to `tokens[b, t]`. So `logp[b, t]` is the
log-probability of token `t` given the tokens before it, and `values[b, t]` is the critic's value of
the tokens before it. A model predicts token `t` from its state at `t - 1`; that shift by one is made
in two functions, `models.token_stats.token_stats` (log-probs and other statistics of the logits) and
`learner.previous` (values). `values_after` is the same head without the shift: what a reward model says
after it has read the token. Objectives and losses get arrays that are aligned already.

`mask` is True only where a loss may look: tokens the policy made, the stop token included. Prompts,
padding and tool output are False, and so is the first token of every segment.

`segment_ids` says which tokens see each other: 0 is padding, 1, 2, ... are documents packed into
one row. Padding may be on either side. An absent field is `None`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from polgrad.registry import suggest

Array = jax.Array
Params = Any


class MixedTokens(NamedTuple):
  """Two tokens at each position; the model reads a mean of their embeddings."""

  tokens: Array  # i32[B, T]
  others: Array  # i32[B, T]
  share: Array  # f32[B], weight of `tokens`; that of `others` is 1 - share

  @property
  def shape(self) -> tuple[int, int]:
    return self.tokens.shape


@struct.dataclass(kw_only=True)
class Prompts:
  """Left-padded prompts and the data rows that they came from."""

  tokens: Array  # i32[N, Tp]
  mask: Array  # bool[N, Tp], False on padding
  ids: Array  # i32[N], row in the data set
  records: tuple = struct.field(pytree_node=False, default=())  # host data, for the rewards


class Layout(NamedTuple):
  """What the model need not compute for a batch.

  Attributes:
    prompt_length: columns that hold prompts in every row; nothing in them is scored.
    shared: number of consecutive rows with the same prompt; the prompt is forwarded once per run of
      them (1: for every row).
    pack: 0 turns packing off; otherwise the number of packed rows is rounded up to one of `pack`
      sizes, so few shapes compile (`polgrad/packing.py`).
    rows: packed rows that hold the sequences of a batch, at the places in `Batch.offset`; 0: the
      batch is not packed.
    scored: the largest number of tokens in the mask of one packed row.
  """

  prompt_length: int = 0
  shared: int = 1
  pack: int = 0
  rows: int = 0
  scored: int = 0


PLAIN = Layout()  # everything is computed

# The sources of rows in a mixed batch; `Batch.stream` holds an index into this list.
STREAMS = ('demonstration', 'sampled')


@struct.dataclass(kw_only=True)
class Batch:
  """The rows of a training batch: one record from the sampler to the loss.

  Each step between them fills in more of the optional fields, which are `None` until then. An array
  without a field has its name in `features`: statistics of the logits, log-probs of further anchors,
  what an estimator or a selection adds. A batch can be read like a mapping from names to arrays, so
  `registry.call(fn, batch)` passes `fn` the arrays that it names. `polgrad/arrays.py` lists all names.
  """

  # Sampled: by the sampler and the collector that calls it, or read off the data.
  tokens: Array  # i32[B, T], token ids
  segment_ids: Array  # i32[B, T], 0 is padding; tokens see each other where the number is the same
  mask: Array  # bool[B, T], tokens that the loss looks at; credit and selections may narrow it
  behavior_logp: Array | None = None  # f32[B, T], nats, under the exact sampling distribution
  finished: Array | None = None  # bool[B], the sampler drew a stop token
  prompt_ids: Array | None = None  # i32[B], row of the prompt in the data set
  group_ids: Array | None = None  # i32[B], equal for rows of one prompt; a pair is a group of two
  stream: Array | None = None  # i32[B], index into `STREAMS`, from a collector that mixes them
  sampled_at: Array | None = None  # i32[B], batches that the phase had collected before

  # Scored: by the verifiers.
  rewards: Array | None = None  # f32[B], weighted sum of the verifiers; 0 where not valid
  valid: Array | None = None  # bool[B], all verifiers of the row answered
  baseline_rewards: Array | None = None  # f32[B, n], of n other completions of the prompt

  # Annotated: by the collector, with the parameters at the time when the batch is used.
  staleness: Array | None = None  # f32[B], batches collected between sampling and use; 0 is fresh
  proximal_logp: Array | None = None  # f32[B, T], nats, the policy at the start of the update phase
  reference_logp: Array | None = None  # f32[B, T], nats, the anchor `reference`
  teacher_logp: Array | None = None  # f32[B, T], nats, the anchor `teacher`
  old_values: Array | None = None  # f32[B, T], units of the reward, critic before each token

  # Credited: by the estimator, or read off the data.
  advantages: Array | None = None  # f32[B, T], units of the reward, or normalised
  returns: Array | None = None  # f32[B, T], units of the reward, targets of the critic
  label: Array | None = None  # f32[B], 1: chosen or desirable, 0: rejected; between: a probability
  weights: Array | None = None  # f32[B], of preference pairs, equal in both rows; from the data

  features: dict[str, Array] = struct.field(default_factory=dict)  # [B, ...], all other arrays

  # How the model forwards the rows; no loss reads these.
  offset: Array | None = None  # i32[B], where a row begins in the packed rows, laid end to end
  layout: Layout = struct.field(pytree_node=False, default=PLAIN)

  def names(self) -> tuple[str, ...]:
    """The names of all arrays that are there: fields, then features."""
    return (*(name for name in FIELDS if getattr(self, name) is not None), *self.features)

  def __iter__(self) -> Iterator[str]:
    return iter(self.names())

  def __contains__(self, name: str) -> bool:
    return name in self.names()

  def __getitem__(self, name: str) -> Array:
    """A field or a feature.

    Raises:
      KeyError: the batch has no array of this name; the message lists those that it has.
    """
    if name not in self:
      raise KeyError(f'{name!r} is not in the batch{suggest(name, self.names())}')
    return getattr(self, name) if name in FIELDS else self.features[name]

  def with_arrays(self, **arrays: Array) -> 'Batch':
    """A copy with these arrays: one with the name of a field replaces it, any other is a feature."""
    fields = {name: x for name, x in arrays.items() if name in FIELDS}
    features = {name: x for name, x in arrays.items() if name not in FIELDS}
    return self.replace(features=self.features | features, **fields)


# The fields of a batch that a loss or an estimator may read.
FIELDS = tuple(n for n in Batch.__dataclass_fields__ if n not in ('features', 'offset', 'layout'))


def turns(mask: np.ndarray) -> list[slice]:
  """The turns of a row, bool[T]: runs of True, because something is read between two turns.

  >>> turns(np.array([False, True, True, False, True]))
  [slice(1, 3, None), slice(4, 5, None)]
  """
  edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
  return [slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@struct.dataclass(kw_only=True)
class Outputs:
  """What the model computes for a batch; all but `logp` only where an objective reads it."""

  logp: Array  # f32[B, T], nats
  entropy: Array | None = None  # f32[B, T], nats
  values: Array | None = None  # f32[B, T], units of the reward, before each token
  values_after: Array | None = None  # f32[B, T], the same head after each token
  # What further layers of a reward model read off the state at the last token (`objectives.heads`).
  user_score: Array | None = None  # f32[B], score of the row for its user
  user_kl: Array | None = None  # f32[B], nats, KL(posterior of the user's latent || prior)
  view_loss: Array | None = None  # f32[B], nats, representation loss of the row's prompt
  dropped: Array | None = None  # f32[B, T], fraction of a token's experts that have dropped it
  stats: dict[str, Array] = struct.field(default_factory=dict)  # f32[B, T], by name


@struct.dataclass(kw_only=True)
class TrainState:
  """Everything that a resumed run needs; one pytree, one checkpoint.

  It holds no random key, because keys are folded from (seed, step, ...).
  """

  step: Array  # i32[], updates tried, over all phases
  phase: Array  # i32[], index into config.phases
  phase_step: Array  # i32[], batches collected in this phase
  update: Array  # i32[], updates tried in this phase; schedules and anchors count it
  cursor: Array  # i32[], records drawn in this phase; the next position of its shuffled source
  skipped: Array  # i32[], consecutive updates skipped because loss or gradient was not finite
  params: Params
  opt_state: Any
  anchors: dict[str, Params]
  collect_state: Any  # of the collector: its memory of earlier batches
  credit_state: Any
  objective_state: Any
  curriculum_state: Any = ()  # what the curriculum remembers of the rows of the data
  # The last response to every data row, if the curriculum reads `drift` (`collect.responses`): NumPy
  # arrays, which are on the host alone and never go through an update.
  responses: Any = ()
  # Of the anchors that learn by their own loss: states of their optimizers and objectives.
  learned: dict[str, Any] = struct.field(default_factory=dict)
  # Of the networks that score hidden states: parameters and states of their optimizers.
  networks: dict[str, Any] = struct.field(default_factory=dict)
