"""Autoregressive decoding with a key-value cache: the program that `make_sampler` compiles.

`Sampler.run` is the whole program:

    prefill     the models read every prompt once
    repeat until no row is left:
      refill    idle slots get the next rows of their queue
      draw      draws a token in every slot; repeated until a refill is due
    finish      prompts and completions become a `Batch`

A *row* is one completion of one prompt. A *slot* is a place in the key-value caches that decodes one
row at a time. A *queue* is the list of rows that one part of the mesh decodes in its own slots, so
that no cache moves between devices; without a mesh there is one queue. N prompts of Tp columns have
B = N * samples_per_prompt rows. Each of the Q queues has S slots and B / Q rows, numbered from 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polgrad.models.policy import Policy
from polgrad.registry import call, inputs
from polgrad.sampling.stopping import StopTable
from polgrad.sharding import platform
from polgrad.types import Array, Batch, Params

# `max_new_tokens` from which on caches have several spans of columns.
SMALL = 128


class Prefilled(NamedTuple):
  """The N prompts as the models have read them. All rows of a prompt start from its entries."""

  caches: dict[str, Any]  # caches of Tp columns by parameter set, N rows first
  hidden: dict[str, Array]  # [N, D] by parameter set: final hidden state of the last prompt token
  length: Array  # i32[N], tokens of the prompt without padding
  text: Array | None = None  # i32[N, Tp], the prompts, -1 on padding; only for `speculation`


class Decoding(NamedTuple):
  """State of the decode loop, for B rows in Q queues of S slots each."""

  step: Array  # i32[], number of draws so far
  # i32[Q, S], number of the slot's row in its queue; B / Q if the slot is idle; the number plus
  # B / Q + 1 if the row waits for the reply to a turn, see `turns`.
  row: Array
  # i32[Q, S], tokens of that row behind its prompt; without meaning if the slot is idle
  made: Array
  upcoming: Array  # i32[Q], number of the first row that waits in the queue; B / Q if none waits
  length: Array  # i32[Q * S], tokens of the prompt of the slot's row
  caches: dict[str, Any]  # caches of Tp + max_new_tokens columns by parameter set, Q * S rows first
  hidden: dict[str, Array]  # [Q * S, D] by parameter set: state from which the next token is drawn
  tokens: Array  # i32[B, max_new_tokens], the completions; pad_id where nothing is drawn
  logp: Array  # f32[B, max_new_tokens], their log-probabilities; 0 where nothing is drawn
  drawn: Array  # bool[B, max_new_tokens], which tokens have been drawn
  finished: Array  # bool[B, 1], which rows have ended with a stop token or a stop string
  seen: Array | None  # u8[Q, S], state of the stop strings; None without any, see `StopTable`
  # Only for `speculation`: i32[Q * S, Tp + max_new_tokens], the tokens of the slot's row, -1 where there
  # is none; and bool[B, max_new_tokens], the tokens that are the first ones of a pass.
  text: Array | None = None
  began: Array | None = None

  @property
  def end(self) -> int:
    """B / Q, the number of rows of a queue. Rows are numbered from 0, so no row has this number."""
    return len(self.tokens) // len(self.upcoming)

  @property
  def idle(self) -> Array:
    """bool[Q, S], the slots without a row."""
    return self.row == self.end

  @property
  def running(self) -> Array:
    """bool[Q, S], the slots whose row gets a token by the next draw."""
    return self.row < self.end

  @property
  def waiting(self) -> Array:
    """bool[Q, S], the slots whose row waits for a reply; there are none in a rollout of one turn."""
    return self.row > self.end


def rows_left(state: Decoding) -> Array:
  """bool[], whether a row is in a slot or still waits in a queue: condition of the outer loop."""
  return jnp.any(state.running) | jnp.any(state.upcoming < state.end)


def no_refill_due(state: Decoding) -> Array:
  """bool[], whether to draw again before the next refill: condition of the inner loop.

  A refill rewrites the prompt columns of all caches, so it waits until an eighth of a queue's slots
  (at least one) are idle. A queue without further rows needs no refill.
  """
  patience = max(1, state.row.shape[1] // 8)
  served = (state.upcoming == state.end) | (jnp.sum(state.idle, axis=1) < patience)
  return ~jnp.all(state.idle) & jnp.all(served)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Sampler:
  """Settings of a sampler, and the steps of its program as methods; see `make_sampler`.

  `params` are always parameter sets by name. All but those of `run` are unstacked, see `Policy`.
  """

  policies: Mapping[str, Policy]  # one model for each name that the behavior policy reads
  behavior_policy: Callable[..., Array]  # logits of the named parameter sets -> logits
  processors: Sequence[Callable[..., Array]]  # applied to its logits, in this order
  max_new_tokens: int  # tokens of the longest completion
  samples_per_prompt: int  # rows of each prompt
  slots: int  # slots over all queues; 0: one for each row
  queues: int  # Q, the data-parallel size of the mesh
  stop_ids: Sequence[int]  # tokens that end a completion
  pad_id: int  # token of padding
  stop_table: StopTable | None = None  # of stop strings; `run` gets its array
  spans: int = 4  # of the columns of new tokens in the caches, from `SMALL` new tokens on

  def run(
    self,
    params: dict[str, Params],
    tokens: Array,
    mask: Array,
    prompt_ids: Array,
    seed: Array,
    step: Array,
    following: Array | None = None,
    *,
    padding: int,
    common: int = 0,
  ) -> Batch:
    """Samples completions of prompts from which `padding` columns on the left were trimmed, and whose
    first `common` tokens are the same.

    `following` is the array of `stop_table`: as an argument it is no constant of the program.
    """
    # Layers are cut from their stacks here: inside the loop it would happen at every step.
    params = self.unstacked(params, step)
    keys = self.row_keys(seed, step, prompt_ids)
    prompts = self.prefill(params, tokens, mask, common)
    draw = functools.partial(self.draw, params, keys, following, tokens.shape[1])
    # Refill, then draw until the next refill is due. The last draws continue until all slots are idle.
    state = jax.lax.while_loop(
      rows_left,
      lambda state: jax.lax.while_loop(no_refill_due, draw, self.refill(prompts, state)),
      self.start(prompts, tokens.shape[1]),
    )
    return self.finish(state, tokens, mask, prompt_ids, padding)

  def unstacked(self, params: dict[str, Any], step: Array) -> dict[str, Any]:
    """The parameter sets that are read, unstacked, and the numbers that are read beside them."""
    read = {name: policy.unstack(params[name]) for name, policy in self.policies.items()}
    if 'batches' in inputs(self.behavior_policy):
      read['batches'] = jnp.asarray(step, jnp.float32)
    return read | {name: params[name] for name in ('entropy_levels',) if name in params}

  def row_keys(self, seed: Array, step: Array, prompt_ids: Array) -> Array:
    """Random keys [B], each folded from seed, step, prompt id and sample index."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    samples = jnp.tile(jnp.arange(self.samples_per_prompt), len(prompt_ids))
    fold = lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
    return jax.vmap(fold)(self._repeat(prompt_ids), samples)

  def prefill(
    self, params: dict[str, Params], tokens: Array, mask: Array, common: int = 0
  ) -> Prefilled:
    """Lets every model read every prompt once: i32[N, Tp] and bool[N, Tp].

    The first `common` tokens, fewer than any prompt has, are read once for all prompts.
    """
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    # These have the first columns of the caches, whatever the length of the prompt. Other tokens keep
    # their columns, all of which are behind the first ones.
    rest = mask & (positions >= common)
    hidden, caches = {}, {}
    for name, policy in self.policies.items():
      cache = policy.init_cache(*tokens.shape)
      if common:
        first = jax.lax.dynamic_slice_in_dim(tokens[0], tokens.shape[1] - jnp.sum(mask[0]), common)
        places = jnp.arange(common, dtype=positions.dtype)
        one = policy.init_cache(1, common)
        _, one = policy.decode(params[name], first[None], places[None], places[None] >= 0, one, 0)
        copies = jax.tree.map(lambda x: jnp.repeat(x, len(tokens), axis=0), one)
        cache = policy.begin(cache, copies, jnp.ones(len(tokens), bool))
      cut = (x[:, common:] for x in (tokens, positions, rest))
      states, caches[name] = policy.decode(params[name], *cut, cache, common)
      # Prompts are left-padded, so the last column holds the last token of each.
      hidden[name] = states[:, -1]
    return Prefilled(caches=caches, hidden=hidden, length=jnp.sum(mask, axis=1))

  def start(self, prompts: Prefilled, prompt_width: int) -> Decoding:
    """The state before the first refill: all slots are idle, and all rows are in the queues."""
    rows = len(prompts.length) * self.samples_per_prompt
    slots = min(self.slots or rows, rows)
    each = slots // self.queues
    return Decoding(
      step=jnp.int32(0),
      row=jnp.full((self.queues, each), rows // self.queues, jnp.int32),
      made=jnp.zeros((self.queues, each), jnp.int32),
      upcoming=jnp.zeros(self.queues, jnp.int32),
      length=jnp.zeros(slots, jnp.int32),
      hidden=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), prompts.hidden),
      caches=self.caches(slots, prompt_width),
      tokens=jnp.full((rows, self.max_new_tokens), self.pad_id, jnp.int32),
      logp=jnp.zeros((rows, self.max_new_tokens), jnp.float32),
      drawn=jnp.zeros((rows, self.max_new_tokens), bool),
      finished=jnp.zeros((rows, 1), bool),
      seen=jnp.zeros((self.queues, each), jnp.uint8) if self.stop_table else None,
    )

  def caches(self, slots: int, prompt_width: int) -> dict[str, Any]:
    """Empty caches by parameter set, with the columns of the prompts and those behind them.

    Only the first of their spans is read in every step, so a step reads what is written by then.
    """
    later = self.spans - 1
    each = self.max_new_tokens // self.spans if self.max_new_tokens >= SMALL else 0
    columns = prompt_width + self.max_new_tokens - later * each
    found = {}
    for name, policy in self.policies.items():
      found[name] = policy.init_cache(slots, columns)
      for _ in range(later if each else 0):
        found[name] = policy.widen(found[name], each)
    return found

  def refill(self, prompts: Prefilled, state: Decoding) -> Decoding:
    """Gives idle slots the next rows of their queue, as long as there are any."""
    # The i-th idle slot of a queue takes the i-th row that has had no slot yet.
    candidate = state.upcoming[:, None] + jnp.cumsum(state.idle, axis=1) - 1
    taken = state.idle & (candidate < state.end)
    row, new = jnp.where(taken, candidate, state.row), taken.reshape(-1)
    # Each new row continues its prompt; the other slots keep what they have.
    prompt = jax.tree.map(lambda x: take(x, row // self.samples_per_prompt), prompts)
    swap = lambda a, b: jnp.where(new.reshape(-1, *(1,) * (b.ndim - 1)), a, b)
    begin = lambda name, policy: policy.begin(state.caches[name], prompt.caches[name], new)
    return state._replace(
      row=row,
      made=jnp.where(taken, 0, state.made),
      upcoming=state.upcoming + jnp.sum(taken, axis=1),
      length=swap(prompt.length, state.length),
      hidden=jax.tree.map(swap, prompt.hidden, state.hidden),
      caches={name: begin(name, policy) for name, policy in self.policies.items()},
      seen=jnp.where(taken, self.stop_table.start, state.seen) if self.stop_table else None,
    )

  def draw(
    self,
    params: dict[str, Params],
    keys: Array,
    following: Array | None,
    prompt_width: int,
    state: Decoding,
  ) -> Decoding:
    """Draws the next token of every slot, then lets the models read it.

    Slots that do not run compute too, because the program has fixed shapes, but they write no token to
    a row, and only empty columns to the caches.
    """
    running, made = state.running.reshape(-1), state.made.reshape(-1)
    log_probs = self.distribution(params, state.hidden)
    token = categorical(take(keys, state.row), made, log_probs)
    logp = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
    # A row ends with a stop token, a stop string or its last column. The token is recorded in any case.
    stopped, seen = self._is_stop(token), None
    if self.stop_table:
      seen = following[state.seen, token.reshape(state.seen.shape)]
      stopped |= seen.reshape(-1) == self.stop_table.end
    over = running & (stopped | (made + 1 == self.max_new_tokens))
    write = lambda x, value: put(x, (state.row, state.made), value)
    hidden, caches = self.read(params, token, running, prompt_width, state)
    return state._replace(
      step=state.step + 1,
      row=jnp.where(over.reshape(state.row.shape), state.end, state.row),
      made=state.made + state.running,
      hidden=hidden,
      caches=caches,
      tokens=write(state.tokens, token),
      logp=write(state.logp, logp),
      drawn=write(state.drawn, jnp.ones_like(running)),
      finished=put(state.finished, (state.row, jnp.zeros_like(state.row)), stopped),
      seen=seen,
    )

  def distribution(self, params: dict[str, Params], hidden: dict[str, Array]) -> Array:
    """Log-probabilities f32[..., V] that tokens are drawn from, for hidden states [..., D]."""
    return self.shaped(
      params, {name: self.policies[name].unembed(params[name], hidden[name]) for name in hidden}
    )

  def shaped(self, params: dict[str, Params], logits: dict[str, Array]) -> Array:
    """Log-probabilities f32[..., V] that tokens are drawn from, for logits [..., V] by parameter set."""
    logits = call(self.behavior_policy, {**params, **logits})
    for processor in self.processors:
      logits = call(processor, {**params, 'logits': logits})
    return jax.nn.log_softmax(logits, axis=-1)

  def read(
    self,
    params: dict[str, Params],
    token: Array,
    running: Array,
    prompt_width: int,
    state: Decoding,
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    """Lets the models read one token of every slot: the next hidden states, and the caches."""
    position = state.length + state.made.reshape(-1)
    column = self.column(prompt_width, state)
    hidden, caches = {}, {}
    for name, policy in self.policies.items():
      states, caches[name] = policy.decode(
        params[name],
        token[:, None],
        position[:, None],
        running[:, None],
        state.caches[name],
        column,
      )
      hidden[name] = states[:, 0]
    return hidden, caches

  def column(self, prompt_width: int, state: Decoding) -> Array:
    """The column of the caches that the next draw writes: i32[], or one for each slot i32[Q * S]."""
    # All slots write the same column in a step, cycling through max_new_tokens columns. A row lives for
    # at most that many steps, so it has ended before its first column is overwritten.
    return prompt_width + state.step % self.max_new_tokens

  def finish(
    self,
    state: Decoding,
    tokens: Array,
    mask: Array,
    prompt_ids: Array,
    padding: int,
  ) -> Batch:
    """Joins prompts and completions, with `padding` more columns on the left."""
    prompts, width = tokens.shape
    repeat = self._repeat
    texts = jnp.concatenate([repeat(jnp.where(mask, tokens, self.pad_id)), state.tokens], axis=1)
    # Which columns are real is known from `drawn`, not from token ids: the pad id may be a stop id.
    real = jnp.concatenate([repeat(mask), state.drawn], axis=1)
    left = lambda x, by, fill: jnp.pad(x, ((0, 0), (by, 0)), constant_values=fill)
    return Batch(
      tokens=left(texts, padding, self.pad_id),
      segment_ids=left(real, padding, False).astype(jnp.int32),
      mask=left(state.drawn, padding + width, False),
      behavior_logp=left(state.logp, padding + width, 0),
      finished=state.finished[:, 0],
      prompt_ids=repeat(prompt_ids),
      group_ids=repeat(jnp.arange(prompts)),
    )

  def _repeat(self, x: Array) -> Array:
    """From one entry for each prompt to one for each row: [N, ...] -> [B, ...]."""
    return jnp.repeat(x, self.samples_per_prompt, axis=0)

  def _is_stop(self, tokens: Array) -> Array:
    """i32[n] -> bool[n], whether each is a stop token."""
    stops = jnp.array(self.stop_ids, jnp.int32)[None]
    return jnp.any(tokens[:, None] == stops, axis=1)


def take(x: Array, index: Array) -> Array:
  """Entries of x [Q * n, ...] by their number in the queue, index i32[Q, S]: [Q * S, ...].

  Numbers past the last entry, such as those of idle slots, give the last one.
  """
  queued = x.reshape(len(index), -1, *x.shape[1:])
  index = jnp.minimum(index, queued.shape[1] - 1)
  return merge(jax.vmap(lambda x, i: x[i])(queued, index))


def put(x: Array, index: tuple[Array, ...], value: Array) -> Array:
  """Writes values to x [Q * n, ...], at an index in each queue.

  Nothing is written outside of x, and so nothing of idle slots, because no row has their number.

  Args:
    index: one or more arrays i32[Q, ...] for the first axes of x; their shapes broadcast.
    value: one entry for each entry of the last of these arrays; its leading axes may be merged.
  """
  queued = x.reshape(len(index[0]), -1, *x.shape[1:])
  value = value.reshape(*index[-1].shape, *x.shape[len(index) :])
  write = lambda x, index, value: x.at[index].set(value, mode='drop')
  return merge(jax.vmap(write)(queued, index, value))


def merge(x: Array) -> Array:
  """[Q, n, ...] -> [Q * n, ...]."""
  return x.reshape(-1, *x.shape[2:])


def categorical(keys: Array, positions: Array, log_probs: Array) -> Array:
  """Draws one token for each row of log_probs f32[n, V].

  The key of a row's noise is folded with the position i32[n] of the token in its completion.
  """
  return drawn(log_probs, gumbel(keys, positions, log_probs.shape[1]))


def gumbel(keys: Array, positions: Array, vocabulary: int) -> Array:
  """Gumbel noise for `drawn`, f32[n, k], of keys [n], each folded with a position i32[n].

  k is the size of the vocabulary, or that of a group and the number of groups added up, see
  `group_sizes`.
  """
  within, groups = group_sizes(vocabulary)
  size = within + groups if groups > 1 else within
  keys = jax.vmap(jax.random.fold_in)(keys, positions)
  return jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)


def drawn(log_probs: Array, noise: Array) -> Array:
  """Draws tokens i32[...] with probabilities exp(log_probs), f32[..., V], by the noise of `gumbel`.

  The argmax of log-probabilities plus Gumbel noise is a draw. Where tokens are in groups, see
  `group_sizes`, a group is drawn by the probabilities of groups, and then one of its tokens. A token
  of probability 0 is never drawn.
  """
  within, groups = group_sizes(log_probs.shape[-1])
  if groups == 1:
    return highest(log_probs + noise)
  missing = within * groups - log_probs.shape[-1]
  unused = [(0, 0)] * (log_probs.ndim - 1) + [(0, missing)]
  filled = jnp.pad(log_probs, unused, constant_values=-jnp.inf)
  # Token i * groups + j is the i-th of group j.
  by_group = filled.reshape(*filled.shape[:-1], within, groups)
  of_group = jnp.log(jnp.sum(jnp.exp(by_group), axis=-2))
  group = highest(of_group + noise[..., within:])
  own = jnp.take_along_axis(by_group, group[..., None, None], axis=-1)[..., 0]
  token = highest(own + noise[..., :within]) * groups + group
  return jnp.minimum(token, log_probs.shape[-1] - 1)  # NaN may choose a place that is no token


def group_sizes(vocabulary: int) -> tuple[int, int]:
  """The number of tokens in a group, and of groups, for `drawn`; one group has all tokens.

  Several groups are for CPUs with a vocabulary above 256. There, noise for every token can be a quarter
  of a rollout's time; with groups it is drawn for each group and for the tokens of one. Other platforms
  make noise where it is added, and never write it; groups would cost them a copy of the logits.

  >>> group_sizes(100), group_sizes(49152)  # on a CPU
  ((100, 1), (32, 1536))
  """
  within = 32 if vocabulary > 256 and platform() == 'cpu' else vocabulary
  return within, -(-vocabulary // within)


def highest(scores: Array) -> Array:
  """The argmax over the last axis of f32[..., V], the first of equal ones."""
  # Two reductions of single numbers: XLA does not vectorise one of pairs on CPUs.
  best = scores == jnp.max(scores, axis=-1, keepdims=True)
  places = jnp.arange(scores.shape[-1], dtype=jnp.int32)
  return jnp.min(jnp.where(best, places, scores.shape[-1] - 1), axis=-1)
