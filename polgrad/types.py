"""The arrays that flow through polgrad.

`N` prompts, `G` samples each, `B = N * G` rows prompt-major, `T` positions, `V` vocabulary.

One convention holds everywhere: `x[b, t]` speaks about `tokens[b, t]`. So `logp[b, t]` is the
log-probability of token `t` given the tokens before it, and nothing shifts outside the model.
`mask` is True only where a loss may look: tokens the policy made, the stop token included. Prompts,
padding and tool output are False, and so is the first token of every segment.

`segment_ids` says which tokens see each other: 0 is padding, 1, 2, ... are documents packed into
one row. Padding may lie on either side. An absent field is `None`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Params = Any
STREAMS = ('demonstration', 'sampled')  # kinds of rows in a batch; `Batch.stream` is the index


@struct.dataclass(kw_only=True)
class Prompts:
  """Left-padded prompts and the data rows that they came from."""

  tokens: Array  # i32[N, Tp]
  mask: Array  # bool[N, Tp], False on padding
  ids: Array  # i32[N], row in the data set
  records: tuple = struct.field(pytree_node=False, default=())  # host data, for the rewards


class Layout(NamedTuple):
  """How the rows of a batch lie, so that less of it needs to be computed.

  Attributes:
    prompt_length: the first columns hold prompts alone; nothing in them is scored.
    shared: so many rows in a line have the same prompt, which is forwarded once for all of them.
    pack: may be packed into fewer rows, whose number is one of so many (`polgrad/packing.py`).
    rows: so many packed rows hold a piece of the batch, each where `Batch.offset` says; 0: none do.
    scored: a packed row has at most so many tokens in the mask.
  """

  prompt_length: int = 0
  shared: int = 1
  pack: int = 0
  rows: int = 0
  scored: int = 0


PLAIN = Layout()  # all is computed


@struct.dataclass(kw_only=True)
class Rollout:
  """What the sampler returns: prompts with their completions."""

  tokens: Array  # i32[B, T]
  segment_ids: Array  # i32[B, T]
  mask: Array  # bool[B, T]
  behavior_logp: Array  # f32[B, T], under the exact sampling distribution
  finished: Array  # bool[B], a stop token was drawn
  prompt_ids: Array  # i32[B], row in the data set
  group_ids: Array  # i32[B], equal for samples of one prompt
  policy_step: Array  # i32[B], the update count of the parameters that sampled the row


@struct.dataclass(kw_only=True)
class Scored(Rollout):
  """A rollout with its rewards. A row whose verifier failed has `valid` False, not reward 0."""

  rewards: Array  # f32[B]
  valid: Array  # bool[B]


@struct.dataclass(kw_only=True)
class Batch:
  """What an objective reads, besides the outputs of the model."""

  tokens: Array  # i32[B, T]
  segment_ids: Array  # i32[B, T]
  mask: Array  # bool[B, T]
  group_ids: Array | None = None  # i32[B]; a preference pair is a group of two
  stream: Array | None = None  # i32[B], index into STREAMS; one stream of a weighted sum owns it
  behavior_logp: Array | None = None  # f32[B, T], the policy that sampled
  proximal_logp: Array | None = None  # f32[B, T], the policy at the start of the update phase
  reference_logp: Array | None = None  # f32[B, T]
  teacher_logp: Array | None = None  # f32[B, T]
  advantages: Array | None = None  # f32[B, T]
  returns: Array | None = None  # f32[B, T], value targets
  old_values: Array | None = None  # f32[B, T], values when the phase began
  rewards: Array | None = None  # f32[B]
  label: Array | None = None  # f32[B], 1 for chosen or desirable rows
  weights: Array | None = None  # f32[B]
  features: dict[str, Array] = struct.field(default_factory=dict)  # [B, ...], read by name
  offset: Array | None = None  # i32[B], where a row begins in the packed rows, laid end to end
  layout: Layout = struct.field(pytree_node=False, default=PLAIN)


@struct.dataclass(kw_only=True)
class Outputs:
  """What the model says of a batch; only `logp` is always there."""

  logp: Array  # f32[B, T]
  entropy: Array | None = None  # f32[B, T], nats
  values: Array | None = None  # f32[B, T]
  stats: dict[str, Array] = struct.field(default_factory=dict)  # f32[B, T], by name


@struct.dataclass(kw_only=True)
class Mean:
  """A mean that has not been divided yet: sums of parts are exact, whatever the split."""

  total: Array  # f32[]
  count: Array  # f32[]

  def value(self) -> Array:
    """total / count, and exactly 0 (with gradient 0) when nothing was counted."""
    safe = jnp.where(self.count > 0, self.count, 1)
    return jnp.where(self.count > 0, self.total / safe, 0)

  def __add__(self, other: 'Mean') -> 'Mean':
    return Mean(total=self.total + other.total, count=self.count + other.count)

  def scale(self, factor: Array | float) -> 'Mean':
    return Mean(total=factor * self.total, count=self.count)


@struct.dataclass(kw_only=True)
class Max:
  """A maximum that merges like a `Mean` does."""

  maximum: Array  # f32[]

  def value(self) -> Array:
    return self.maximum

  def __add__(self, other: 'Max') -> 'Max':
    return Max(maximum=jnp.maximum(self.maximum, other.maximum))


@struct.dataclass(kw_only=True)
class Effective:
  """The effective sample size of weights, as a share: (sum w)^2 / (n sum w^2), 1 if all are equal."""

  total: Array  # f32[]
  squares: Array  # f32[]
  count: Array  # f32[]

  @classmethod
  def of(cls, weights: Array, where: Array) -> 'Effective':
    w = jnp.where(where, weights, 0)
    return cls(total=jnp.sum(w), squares=jnp.sum(w * w), count=jnp.sum(where, dtype=w.dtype))

  def value(self) -> Array:
    size = self.count * self.squares
    return jnp.where(size > 0, self.total**2 / jnp.where(size > 0, size, 1), 0)

  def __add__(self, other: 'Effective') -> 'Effective':
    return Effective(
      total=self.total + other.total,
      squares=self.squares + other.squares,
      count=self.count + other.count,
    )


BINS = 255  # of a histogram of log-ratios; the middle one holds 0
FINEST = 1e-3  # nats; around 0 bins are a tenth of it wide, far out a tenth of their distance
STEP = 0.083  # from 0 to 20 nats in 127 bins


@struct.dataclass(kw_only=True)
class Quantile:
  """A quantile of exp(x): a histogram of asinh(x / FINEST), so that parts merge exactly.

  The value is that of the middle of a bin: exact for x = 0, within a tenth of x elsewhere.
  """

  counts: Array  # f32[BINS]
  share: float = struct.field(pytree_node=False)

  @classmethod
  def of(cls, x: Array, where: Array, *, share: float) -> 'Quantile':
    bins = jnp.round(jnp.arcsinh(x / FINEST) / STEP).astype(jnp.int32) + BINS // 2
    bins = jnp.clip(bins, 0, BINS - 1)
    counts = jnp.zeros(BINS, jnp.float32).at[bins].add(where.astype(jnp.float32))
    return cls(counts=counts, share=share)

  def value(self) -> Array:
    below = jnp.cumsum(self.counts)
    bin_ = jnp.argmax(below >= jnp.maximum(self.share * below[-1], 1e-6))
    return jnp.exp(FINEST * jnp.sinh((bin_ - BINS // 2) * STEP))

  def __add__(self, other: 'Quantile') -> 'Quantile':
    return Quantile(counts=self.counts + other.counts, share=self.share)


Metric = Mean | Max | Effective | Quantile  # what merges over the parts of a batch


@struct.dataclass(kw_only=True)
class TrainState:
  """Everything that a resumed run needs; one pytree, one checkpoint.

  Random keys are folded from (seed, step, ...), so no key is carried.
  """

  step: Array  # i32[], updates tried, over all phases
  phase: Array  # i32[], index into config.phases
  phase_step: Array  # i32[], rollouts (or data batches) consumed in this phase
  update: Array  # i32[], updates tried in this phase; schedules and anchors count it
  cursor: Array  # i32[], next position of this phase's shuffled source
  skipped: Array  # i32[], updates refused in a row because loss or gradient was not finite
  params: Params
  opt_state: Any
  anchors: dict[str, Params]
  collect_state: Any  # of the collector: rollouts that wait or are used again
  credit_state: Any
  objective_state: Any
