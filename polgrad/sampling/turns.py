"""Sampling rows of several turns: between two turns of the policy, the row reads a reply.

The sampler of `make_turn_sampler` keeps the cache of a row while its reply is being made, and reads only
the tokens of the reply afterwards. Unlike the one program of `make_sampler`, its rollout is a loop on
the host, because replies come from there. It uses these programs, whose state stays on the devices:

    begin       the models read every prompt once; all rows are in the queues
    repeat until no row is left:
      (host)    hands in the turns that have ended, and takes the replies that have come
      close     frees the slots of rows that are over
      extend    reads a chunk of every reply; its rows resume drawing
      refill    idle slots get the next rows of their queue
      advance   draws a token in every running slot; repeated until the host is needed
    finish      prompts and completions become a `Batch`

A slot is *idle* (without a row), *running*, or *waiting*: its turn has ended, and no reply has come.
In the caches, the tokens of a row have the columns that they have in its row of the batch, and chunks of
a reply have one fixed width. So the numbers of a row do not depend on when the replies of others come.
The later half of the columns is a second span of the cache; attention skips it while it is empty.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from polgrad import exchanges
from polgrad.compiling import Program, jit
from polgrad.environments import Replies
from polgrad.models.policy import Policy
from polgrad.sampling import behavior_policies, processors
from polgrad.sampling.decoding import Decoding, Prefilled, Sampler, merge, put, take
from polgrad.sampling.sampler import common_tokens, configure, spare_columns
from polgrad.sampling.stopping import StopTable
from polgrad.sharding import constrain, place_batch
from polgrad.types import Array, Batch, Params

CHUNK = 16  # tokens of a reply that are read at once
# Slots are served in groups of K = max(1, S // SHARE) of the S slots of a queue, see `at_once`: K slots
# read a chunk together, and drawing is interrupted when K slots have ended a turn, or K are idle.
SHARE = 4
# Largest number of draws that are made although the host has something to do: a turn has ended, or a
# reply is due.
LATEST = 8


class Turns(NamedTuple):
  """State of a rollout. Rows that wait for a reply are not `running` in `decoding`."""

  decoding: Decoding
  begun: Array  # i32[Q, S], tokens that the slot's row had behind its prompt when its turn began
  given: Array  # bool[B, max_new_tokens], tokens of replies


class Told(NamedTuple):
  """What the host reads after some draws: an entry for each slot, Q * S of them."""

  row: Array  # i32, number of the slot's row in the batch; -1 if the slot is idle
  waiting: Array  # bool, whether the row waits for a reply
  made: Array  # i32, tokens of the row behind its prompt
  count: Array  # i32, tokens that its turn has so far
  stopped: Array  # bool, whether a stop token or a stop string has ended the turn
  tokens: Array  # i32[Q * S, C], the tokens of the turn; those behind them have no meaning
  queued: Array  # i32[Q], rows that have had no slot yet, by queue

  @property
  def idle(self) -> np.ndarray:
    """bool[Q * S], the slots without a row."""
    return self.row < 0

  @property
  def running(self) -> np.ndarray:
    """bool[Q * S], the slots whose row gets a token by the next draw."""
    return (self.row >= 0) & ~self.waiting


class Chunk(NamedTuple):
  """Pieces of replies that are read together, by K slots of each queue."""

  slot: np.ndarray  # i32[Q, K], number of a slot in its queue; S where there are fewer than K
  tokens: np.ndarray  # i32[Q * K, CHUNK]
  count: np.ndarray  # i32[Q * K], tokens of each piece; 0 where there is none
  last: np.ndarray  # bool[Q * K], whether the piece is the last one of its reply


class Plan(NamedTuple):
  """What the host has decided after it has taken replies."""

  over: np.ndarray  # bool[Q * S], slots whose row is over
  finished: np.ndarray  # bool[Q * S], those of them whose row is `finished`
  due: np.ndarray  # bool[], whether replies are still being made
  chunks: Chunk  # what is read, one chunk after the other: every array has a leading axis of chunks


def make_turn_sampler(
  policies: Mapping[str, Policy],
  *,
  max_new_tokens: int,
  turn_tokens: int = 0,
  behavior_policy: Callable[..., Array] = behavior_policies.current,
  default: Policy | None = None,
  samples_per_prompt: int = 1,
  slots: int = 0,
  stop_ids: Sequence[int] = (),
  stop_table: StopTable | None = None,
  pad_id: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  token_temperature: Callable[..., Array] = processors.unchanged,
  mesh: Mesh | None = None,
) -> Callable[..., Batch]:
  """Makes `sample(params, tokens, mask, prompt_ids, *, seed, step, replies) -> Batch`.

  A row is a prompt, a turn of the policy, a reply, the next turn, and so on. A turn ends with a stop
  token, a stop string, or after `turn_tokens` tokens. It is handed to `replies` (see
  `environments.Replies`) as the tokens that were drawn. The tokens of the reply are appended unchanged,
  and the models read only these. The row is over when its reply is None; then it is `finished` if its
  last turn was ended by a stop. If its columns are used up, or the reply leaves no room for another
  token, it is over and not `finished`. Other rows are decoded while a reply is being made.

  Settings and batch are those of `make_sampler`. `mask` is True on drawn tokens only; the tokens of
  replies are in `tokens` and `segment_ids`, with a `behavior_logp` of 0. The noise of a draw is folded
  from (seed, step, prompt id, sample index, tokens of the row behind its prompt), so a row depends
  neither on the rest of the batch nor on the time that replies take; a row whose first reply is None
  is that of `make_sampler`. With slots=0 the batch is the same bit by bit for the same replies.

  With several processes, the first one alone asks `replies`, and tells the others what to read; they
  may pass None. Every process gets the same batch.

  Args:
    policies: see `make_sampler`, as for all arguments that are not explained here.
    max_new_tokens: columns behind the prompt, for drawn tokens and replies together.
    turn_tokens: the largest number of tokens that a turn may draw; 0: no limit but `max_new_tokens`.
    slots: number of rows that have a place in the caches at a time. A row keeps its place while it
      waits for a reply.

  Raises:
    ValueError: a setting that `make_sampler` refuses, or `turn_tokens` below 0; from `sample`, a reply
      to a row that waits for none, without tokens, or with a token outside of the vocabulary.
  """
  if turn_tokens < 0:
    raise ValueError(f'turn_tokens must be 0 (no limit) or more, got {turn_tokens}')
  sampler = configure(
    TurnSampler,
    policies,
    mesh,
    default=default,
    max_new_tokens=max_new_tokens,
    behavior_policy=behavior_policy,
    samples_per_prompt=samples_per_prompt,
    slots=slots,
    stop_ids=stop_ids,
    stop_table=stop_table,
    pad_id=pad_id,
    turn_tokens=turn_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    token_temperature=token_temperature,
  )
  rollout = Rollout(sampler, mesh)

  def sample(params, tokens, mask, prompt_ids, *, seed, step, replies: Replies | None) -> Batch:
    padding = spare_columns(mask)
    prompts = (tokens[:, padding:], mask[:, padding:], prompt_ids)
    sizes = padding, common_tokens(*prompts[:2])
    if mesh is None:
      return rollout.run(params, prompts, seed, step, *sizes, replies)
    with jax.set_mesh(mesh):
      return rollout.run(params, place_batch(mesh, prompts), seed, step, *sizes, replies)

  return sample


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TurnSampler(Sampler):
  """Settings of a sampler of several turns, and its programs as methods."""

  turn_tokens: int  # the largest number of tokens of a turn; 0: no limit but `max_new_tokens`
  # Of the columns behind the prompts; later ones are read only after a row needs them.
  spans: int = 2

  def begin(
    self,
    params: dict[str, Params],
    tokens: Array,
    mask: Array,
    prompt_ids: Array,
    seed: Array,
    step: Array,
    *,
    common: int,
  ) -> tuple[dict[str, Params], Array, Prefilled, Turns, Told]:
    """Unstacked parameters, keys of the rows, the prompts, and a state in which all slots are idle."""
    params = self.unstacked(params, step)
    keys = self.row_keys(seed, step, prompt_ids)
    prompts = self.prefill(params, tokens, mask, common)
    state = self.start(prompts, tokens.shape[1])
    turns = Turns(state, jnp.zeros_like(state.made), jnp.zeros_like(state.drawn))
    return params, keys, prompts, settled(turns), self.tell(turns)

  def fill(self, prompts: Prefilled, turns: Turns) -> Turns:
    """Gives idle slots the next rows of their queue."""
    state = self.refill(prompts, turns.decoding)
    new = turns.decoding.idle & state.running
    return settled(turns._replace(decoding=state, begun=jnp.where(new, 0, turns.begun)))

  def close(self, row: Array, finished: Array, over: Array, whether: Array) -> tuple[Array, Array]:
    """Makes slots idle, where `over` bool[Q * S] is True: the new `row` and `finished` of the state.

    Args:
      whether: bool[Q * S], whether their rows are `finished`.
    """
    end = len(finished) // len(row)
    over = over.reshape(row.shape)
    number = jnp.where(over, row - end - 1, end)
    finished = put(finished, (number, jnp.zeros_like(row)), whether)
    return batch_first(jnp.where(over, end, row)), batch_first(finished)

  def extend(self, params: dict[str, Params], turns: Turns, chunk: Chunk, *, width: int) -> Turns:
    """Reads pieces of replies; rows whose reply is complete draw again afterwards.

    Args:
      width: columns of the prompts.
    """
    state, slot, count = turns.decoding, chunk.slot, chunk.count
    of = lambda x: take(x, slot)
    made = of(merge(state.made))
    places = jnp.broadcast_to(jnp.arange(CHUNK)[None], chunk.tokens.shape)
    valid = places < count[:, None]
    position = (of(state.length) + made)[:, None] + places
    final = jnp.maximum(count - 1, 0)[:, None, None]
    back = lambda x, value: put(x, (slot,), value)
    hidden, caches = {}, {}
    for name, policy in self.policies.items():
      # What is not valid lies behind the tokens of the row, where columns are empty anyway.
      states, cache = policy.decode(
        params[name],
        chunk.tokens,
        position,
        valid,
        jax.tree.map(of, state.caches[name]),
        width + made,
      )
      caches[name] = jax.tree.map(back, state.caches[name], cache)
      states = jnp.take_along_axis(states, final, axis=1)[:, 0]
      hidden[name] = back(state.hidden[name], states)
    # The tokens become part of the rows. What is not valid gets a column that no row has.
    number = of(merge(state.row)).reshape(slot.shape) - state.end - 1
    column = jnp.where(valid, made[:, None] + places, self.max_new_tokens)
    place = (number[..., None], column.reshape(*slot.shape, -1))
    complete = jnp.where(chunk.last.reshape(slot.shape), slot, state.row.shape[1])
    change = lambda x, slot, value: put(merge(x), (slot,), value).reshape(x.shape)
    begins = jnp.full(slot.shape, self.stop_table.start, jnp.uint8) if self.stop_table else None
    made = made + count
    state = state._replace(
      row=change(state.row, complete, number),
      made=change(state.made, slot, made),
      hidden=hidden,
      caches=caches,
      tokens=put(state.tokens, place, chunk.tokens),
      seen=change(state.seen, complete, begins) if self.stop_table else None,
    )
    begun = change(turns.begun, complete, made)
    return settled(Turns(state, begun, put(turns.given, place, valid)))

  def advance(
    self,
    params: dict[str, Params],
    keys: Array,
    following: Array | None,
    turns: Turns,
    due: Array,
    *,
    width: int,
  ) -> tuple[Turns, Told]:
    """Draws until no slot runs or the host is needed.

    The host is needed when K slots of a queue have ended a turn (see `at_once`), or `LATEST` draws after
    the first of them did. If replies are `due`, these draws count from the beginning.
    """
    draw = functools.partial(self.draw, params, keys, following, width)
    before = jnp.sum(turns.decoding.waiting, axis=1)
    patience = at_once(turns.begun.shape[1])

    def ended(turns: Turns) -> Array:
      return jnp.sum(turns.decoding.waiting, axis=1) - before

    def draws_on(carry: tuple[Turns, Array]) -> Array:
      turns, late = carry
      served = jnp.all(ended(turns) < patience)
      return jnp.any(turns.decoding.running) & served & (late < LATEST)

    def draw_once(carry: tuple[Turns, Array]) -> tuple[Turns, Array]:
      turns, late = carry
      turns = self.draw_in_turn(draw, turns)
      return turns, late + (due | jnp.any(ended(turns) > 0))

    turns, _ = jax.lax.while_loop(draws_on, draw_once, (turns, jnp.int32(0)))
    return settled(turns), self.tell(turns)

  def draw_in_turn(self, draw: Callable[[Decoding], Decoding], turns: Turns) -> Turns:
    """Draws a token in every running slot; a row whose turn it ends waits for a reply."""
    before, after = turns.decoding, draw(turns.decoding)
    full = after.made - turns.begun == self.turn_tokens
    ended = before.running & (after.idle | full)
    row = jnp.where(ended, before.row + before.end + 1, after.row)
    return turns._replace(decoding=after._replace(row=row))

  def tell(self, turns: Turns) -> Told:
    """What the host reads, the same on every device."""
    state = turns.decoding
    number = jnp.where(state.waiting, state.row - state.end - 1, state.row)
    first = jnp.arange(len(number))[:, None] * state.end
    size = self.turn_tokens or self.max_new_tokens
    columns = turns.begun.reshape(-1, 1) + jnp.arange(size)[None]
    tokens = jnp.take_along_axis(take(state.tokens, number), columns, axis=1, mode='clip')
    told = Told(
      row=merge(jnp.where(state.idle, -1, number + first)),
      waiting=merge(state.waiting),
      made=merge(state.made),
      count=merge(state.made - turns.begun),
      stopped=take(state.finished, number)[:, 0],
      tokens=tokens,
      queued=state.end - state.upcoming,
    )
    return jax.tree.map(replicated, told)

  def column(self, prompt_width: int, state: Decoding) -> Array:
    """The column of the next token in each slot: the one that it has in its row of the batch."""
    return prompt_width + state.made.reshape(-1)

  def end(
    self, turns: Turns, tokens: Array, mask: Array, prompt_ids: Array, *, padding: int
  ) -> Batch:
    """The batch of a state without rows in slots."""
    batch = self.finish(turns.decoding, tokens, mask, prompt_ids, padding)
    left = batch.tokens.shape[1] - turns.given.shape[1]
    given = jnp.pad(turns.given, ((0, 0), (left, 0)))
    return batch.replace(segment_ids=batch.segment_ids + given)


def settled(turns: Turns) -> Turns:
  """The state, laid on the mesh in one way, so that no program meets another layout of it."""
  state = turns.decoding
  arrays = jax.tree.map(batch_first, state._replace(caches={}, step=()))
  state = arrays._replace(caches=state.caches, step=state.step)
  return Turns(state, batch_first(turns.begun), batch_first(turns.given))


def batch_first(x: Array) -> Array:
  """Constrains the first axis of x to the rows of the mesh."""
  return constrain(x, ('batch', *('length',) * (x.ndim - 1)))


def replicated(x: Array) -> Array:
  """Constrains x to be the same on all devices, if a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


class Rollout:
  """The loop on the host."""

  def __init__(self, sampler: TurnSampler, mesh: Mesh | None):
    self._sampler, self._mesh = sampler, mesh
    table = sampler.stop_table
    self._following = table.following if table else None
    self._begin = Program(jit(sampler.begin, static_argnames='common'))
    self._fill = jit(sampler.fill, donate_argnums=1)
    self._close = jit(sampler.close)
    self._extend = jit(sampler.extend, static_argnames='width', donate_argnums=1)
    self._advance = jit(sampler.advance, static_argnames='width', donate_argnums=3)
    self._end = jit(sampler.end, static_argnames='padding')

  def run(
    self, params, prompts, seed, step, padding: int, common: int, replies: Replies | None
  ) -> Batch:
    """The batch for prompts (tokens, mask, ids) that were trimmed by `padding` columns, and whose first
    `common` tokens are the same."""
    width = prompts[0].shape[1]
    params, keys, read, turns, told = self._begin(params, *prompts, seed, step, common=common)
    told, desk = on_host(told), Desk(self._sampler, replies)
    while not told.idle.all() or told.queued.any():
      plan = exchanges.first(functools.partial(desk.plan, told), 'plan of turns')
      # From here on all processes do the same, because `told` and `plan` are equal in all of them.
      # Rows that are over leave their slots, and the others read their replies.
      if plan.over.any():
        turns = self._close_rows(turns, plan)
      for chunk in zip(*plan.chunks):
        turns = self._extend(params, turns, Chunk(*self._place(chunk)), width=width)
      # Idle slots get new rows, and slots that run draw until the host is needed again.
      drawing = (told.running & ~plan.over).any() or plan.chunks.last.any()
      told = told._replace(row=np.where(plan.over, -1, told.row))
      if self._refill_due(told, drawing):
        turns, drawing = self._fill(read, turns), True
      if drawing:
        turns, told = self._advance(params, keys, self._following, turns, plan.due, width=width)
        told = on_host(told)
    return self._end(turns, *prompts, padding=padding)

  def _close_rows(self, turns: Turns, plan: Plan) -> Turns:
    state = turns.decoding
    over, finished = self._place((plan.over, plan.finished))
    row, finished = self._close(state.row, state.finished, over, finished)
    return turns._replace(decoding=state._replace(row=row, finished=finished))

  def _refill_due(self, told: Told, drawing: bool) -> bool:
    """Whether idle slots get rows now: it rewrites all caches, so it waits until some are idle."""
    idle = told.idle.reshape(len(told.queued), -1)
    patience = at_once(idle.shape[1]) if drawing else 1
    return bool((idle.sum(axis=1)[told.queued > 0] >= patience).any())

  def _place(self, arrays: tuple) -> tuple:
    return arrays if self._mesh is None else place_batch(self._mesh, arrays)


class Desk:
  """Hands turns in, takes replies, and cuts them into chunks; in the first process only."""

  def __init__(self, sampler: TurnSampler, replies: Replies):
    self._columns, self._replies = sampler.max_new_tokens, replies
    self._vocabulary = next(iter(sampler.policies.values())).config.vocab_size
    self._asked: dict[int, int] = {}  # the slots of the rows that wait for a reply

  def plan(self, told: Told) -> Plan:
    """Hands in the turns that have ended, and decides what to do with the replies that have come."""
    # A turn is handed in once, in the first plan after it has ended.
    for slot in np.flatnonzero(told.waiting & ~told.idle).tolist():
      row = int(told.row[slot])
      if row not in self._asked:
        self._asked[row] = slot
        ids = told.tokens[slot, : told.count[slot]].tolist()
        self._replies.ask(row, ids, bool(told.stopped[slot]))
    # Wait for a reply only if nothing can be drawn meanwhile.
    idle = told.idle.reshape(len(told.queued), -1).any(axis=1)
    drawing = told.running.any() or (idle & (told.queued > 0)).any()
    taken = self._replies.take(wait=not drawing) if self._asked else []
    # A reply ends its row, has no room in it, or will be read.
    over, finished = np.zeros((2, len(told.row)), bool)
    texts = {}
    for row, ids in taken:
      slot = self._check(row, ids)
      if ids is None or told.made[slot] + len(ids) >= self._columns:
        over[slot], finished[slot] = True, ids is None and told.stopped[slot]
      else:
        texts[slot] = ids
    queues = len(told.queued)
    pieces = chunks(texts, queues, len(told.row) // queues)
    return Plan(over, finished, np.bool_(self._asked), pieces)

  def _check(self, row: int, ids: list[int] | None) -> int:
    """The slot of the row that was answered."""
    if row not in self._asked:
      raise ValueError(f'a reply to row {row}, which waits for none')
    if ids is not None and not len(ids):
      raise ValueError(f'the reply to row {row} has no tokens; one that ends the row is None')
    if ids is not None and not 0 <= min(ids) <= max(ids) < self._vocabulary:
      raise ValueError(
        f'the reply to row {row} has tokens outside of the vocabulary of {self._vocabulary}: '
        f'{min(ids)} to {max(ids)}'
      )
    return self._asked.pop(row)


def on_host(told: Told) -> Told:
  """NumPy arrays, in every process."""
  return jax.tree.map(np.asarray, told)


def chunks(texts: Mapping[int, Sequence[int]], queues: int, slots: int) -> Chunk:
  """The tokens that some of the slots read, cut into pieces of CHUNK tokens.

  Args:
    texts: tokens by slot, which is numbered over all queues, `slots` in each.
  """
  made = []
  for start in range(0, max(map(len, texts.values()), default=0), CHUNK):
    # Pieces of one text are in different chunks, because each reads those before it.
    pieces = [[] for _ in range(queues)]
    for slot, ids in texts.items():
      if start < len(ids):
        piece = (slot % slots, ids[start : start + CHUNK], start + CHUNK >= len(ids))
        pieces[slot // slots].append(piece)
    for first in range(0, max(map(len, pieces)), at_once(slots)):
      made.append([queue[first : first + at_once(slots)] for queue in pieces])
  out = empty_chunks(len(made), queues, slots)
  for i, chunk in enumerate(made):
    for queue, pieces in enumerate(chunk):
      for k, (slot, ids, last) in enumerate(pieces):
        place = i, queue * at_once(slots) + k
        out.slot[i, queue, k] = slot
        out.tokens[place][: len(ids)] = ids
        out.count[place], out.last[place] = len(ids), last
  return out


def empty_chunks(number: int, queues: int, slots: int) -> Chunk:
  """That number of chunks, in which no slot reads anything."""
  each = at_once(slots)
  return Chunk(
    slot=np.full((number, queues, each), slots, np.int32),
    tokens=np.zeros((number, queues * each, CHUNK), np.int32),
    count=np.zeros((number, queues * each), np.int32),
    last=np.zeros((number, queues * each), bool),
  )


def at_once(slots: int) -> int:
  """K, the slots that are served together, of the slots of a queue."""
  return max(1, slots // SHARE)
