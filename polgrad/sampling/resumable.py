"""Sampling in pieces: rows that are not over continue later, under other parameters.

Between two pieces the rows are `Rows`, arrays that a checkpoint can hold. A piece is two programs:

    read        the models read the prompts and what has been drawn of their rows
    advance     draws a token in every row that is not over; repeated until enough prompts are complete

`read` fills the caches anew, so all keys and values are those of the parameters that draw next, and a
run that resumes from a checkpoint draws the same rows. A sampler that may be interrupted keeps its
caches between two pieces. A third program then takes the place of `read`:

    renew       the models read the prompts of new rows, and by new parameters the last token of others

With the same parameters nothing else has to be read. With new ones the other keys and values are those
of the parameters that drew the token behind them (PipelineRL, arXiv:2509.19128; Magistral,
arXiv:2506.10910), which `refill` prevents (AReaL, arXiv:2505.24298).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from polgrad.compiling import Program, jit
from polgrad.models.policy import Policy
from polgrad.sampling import behavior_policies, processors
from polgrad.sampling.decoding import Sampler, categorical
from polgrad.sampling.sampler import configure, spare_columns
from polgrad.sampling.stopping import StopTable
from polgrad.sharding import constrain, place_batch, to_host
from polgrad.types import Array, Params

EMPTY = -1  # `Rows.begun` where there is no row


class Rows(NamedTuple):
  """Rows in flight: B = F * G of F prompts, those of a prompt consecutive; N tokens behind a prompt."""

  tokens: Array  # i32[B, Tp + N], prompts padded on the left, completions from column Tp on
  real: Array  # bool[B, Tp + N], tokens of the prompt, and those that have been drawn
  logp: Array  # f32[B, N], nats, log-probs of the drawn tokens; 0 where nothing is drawn
  versions: Array  # i32[B, N], `version` of the piece that drew the token; 0 where nothing is drawn
  made: Array  # i32[B], tokens drawn so far
  over: Array  # bool[B], whether the row is complete
  finished: Array  # bool[B], whether a stop token or a stop string has ended it
  seen: Array  # u8[B], state of the stop strings, see `StopTable`; 0 without any
  begun: Array  # i32[B], number of the batch whose step drew the prompt; `EMPTY`: no row
  prompt_ids: Array  # i32[B], row of the prompt in the data set
  noise_ids: Array  # i32[B], folded into the keys; different for prompts that were drawn together


class Read(NamedTuple):
  """What the models have read of the rows."""

  hidden: dict[str, Array]  # [B, D] by parameter set: state from which the next token is drawn
  caches: dict[str, Any]  # of Tp + N columns, by parameter set


class Kept(NamedTuple):
  """What is left of a piece for the next one."""

  rows: Rows  # NumPy, as the piece has left them, without columns that no prompt needs
  read: Read
  version: int

  def continued(self, rows: Rows) -> np.ndarray | None:
    """bool[B], the rows that the models have read; None if one would have to be read with its tokens."""
    if rows.tokens.shape != self.rows.tokens.shape:
      return None
    same = lambda name: getattr(rows, name) == getattr(self.rows, name)
    found = same('begun') & same('noise_ids') & same('made') & (rows.made > 0)
    found &= (same('tokens') & same('real')).all(axis=1)
    return found if not (rows.made > 0)[~found].any() else None


def empty(prompts: int, samples_per_prompt: int, prompt_length: int, new: int) -> Rows:
  """Places for the rows of some prompts, without any."""
  rows = prompts * samples_per_prompt
  zeros = lambda dtype, *shape: np.zeros((rows, *shape), dtype)
  return Rows(
    tokens=zeros(np.int32, prompt_length + new),
    real=zeros(bool, prompt_length + new),
    logp=zeros(np.float32, new),
    versions=zeros(np.int32, new),
    made=zeros(np.int32),
    over=zeros(bool),
    finished=zeros(bool),
    seen=zeros(np.uint8),
    begun=np.full(rows, EMPTY, np.int32),
    prompt_ids=zeros(np.int32),
    noise_ids=zeros(np.int32),
  )


def complete(rows: Rows, samples_per_prompt: int) -> Array:
  """bool[F], the prompts whose rows are all over."""
  return (rows.over & (rows.begun != EMPTY)).reshape(-1, samples_per_prompt).all(axis=1)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ResumableSampler(Sampler):
  """Settings of a sampler of rows in flight, and its programs as methods."""

  def read_rows(
    self, params: dict[str, Params], rows: Rows, version: Array
  ) -> tuple[dict[str, Params], Rows, Read]:
    """Unstacked parameters, the rows, and what the models have read of them."""
    params = self.unstacked(params, version)
    width = rows.real.shape[1]
    positions = jnp.maximum(jnp.cumsum(rows.real, axis=1) - 1, 0)
    # The last token of a row; the states of places without a row are not used.
    last = width - 1 - jnp.argmax(rows.real[:, ::-1], axis=1)
    hidden, caches = {}, {}
    for name, policy in self.policies.items():
      cache = policy.init_cache(*rows.real.shape)
      states, caches[name] = policy.decode(
        params[name], rows.tokens, positions, rows.real, cache, 0
      )
      hidden[name] = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    return params, _by_row(rows), Read(_by_row(hidden), caches)

  def renew(
    self,
    params: dict[str, Params],
    rows: Rows,
    read: Read,
    version: Array,
    continued: Array,
    moved: Array,
  ) -> tuple[dict[str, Params], Rows, Read]:
    """`read_rows` where the models have read some rows before: they read the prompts of the others.

    Args:
      read: of the piece before.
      continued: bool[B], the rows that they have read; no token of the others is drawn yet.
      moved: bool[], whether the parameters are new: the last token of each row is then read again, so
        that they alone say what the next one is, from keys and values that others have made too.
    """
    params = self.unstacked(params, version)
    width = rows.real.shape[1] - self.max_new_tokens
    real = rows.real[:, :width]
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    last = width - 1 + rows.made  # column of the last token
    token = jnp.take_along_axis(rows.tokens, last[:, None], axis=1)
    place = jnp.sum(rows.real, axis=1)[:, None] - 1
    again = continued & moved
    hidden, caches = {}, {}
    for name, policy in self.policies.items():
      prompt = policy.init_cache(*real.shape)
      states, prompt = policy.decode(
        params[name], rows.tokens[:, :width], positions, real, prompt, 0
      )
      cache = policy.begin(read.caches[name], prompt, ~continued)
      # Rows that are not read again write behind the last column, which is nowhere.
      column = jnp.where(again, last, rows.real.shape[1])
      renewed, caches[name] = policy.decode(
        params[name], token, place, again[:, None], cache, column
      )
      old = jnp.where(again[:, None], renewed[:, 0], read.hidden[name])
      hidden[name] = jnp.where(continued[:, None], old, states[:, -1])
    return params, _by_row(rows), Read(_by_row(hidden), caches)

  def advance(
    self,
    params: dict[str, Params],
    rows: Rows,
    read: Read,
    following: Array | None,
    seed: Array,
    version: Array,
    due: Array,
    needed: Array,
    limit: Array,
  ) -> tuple[Rows, Read]:
    """Draws until `needed` prompts are complete and so are those that are `due`, or all, or `limit`
    tokens a row were drawn.

    Args:
      due: bool[F], prompts that the next batch has to contain.
    """
    samples = self.samples_per_prompt
    draw = functools.partial(self.draw_one, params, self.keys_of(seed, rows), following, version)

    def draws_on(carry: tuple[Array, Rows, Read]) -> Array:
      count, rows, _ = carry
      done = complete(rows, samples)
      enough = (jnp.sum(done) >= needed) & jnp.all(done | ~due)
      return (count < limit) & ~enough & jnp.any(running(rows))

    def draw_once(carry: tuple[Array, Rows, Read]) -> tuple[Array, Rows, Read]:
      count, rows, read = carry
      return count + 1, *draw(rows, read)

    _, rows, read = jax.lax.while_loop(draws_on, draw_once, (jnp.int32(0), rows, read))
    return _by_row(rows), read._replace(hidden=_by_row(read.hidden))

  def keys_of(self, seed: Array, rows: Rows) -> Array:
    """Random keys [B]: those of `Sampler.row_keys` in the step in which the prompt was drawn."""
    samples = jnp.arange(len(rows.made)) % self.samples_per_prompt
    key = jax.random.key(seed)

    def fold(begun, prompt, sample):
      one = jax.random.fold_in(jax.random.fold_in(key, begun), prompt)
      return jax.random.fold_in(one, sample)

    return jax.vmap(fold)(rows.begun, rows.noise_ids, samples)

  def draw_one(
    self,
    params: dict[str, Params],
    keys: Array,
    following: Array | None,
    version: Array,
    rows: Rows,
    read: Read,
  ) -> tuple[Rows, Read]:
    """Draws the next token of every row that is not over, then lets the models read it."""
    new, draws = self.max_new_tokens, running(rows)
    log_probs = self.distribution(params, read.hidden)
    token = categorical(keys, rows.made, log_probs)
    logp = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
    stopped, seen = self._is_stop(token), rows.seen
    if self.stop_table:
      seen = following[rows.seen, token]
      stopped |= seen == self.stop_table.end
    # Rows that do not draw write behind the last column, which is nowhere.
    place = jnp.where(draws, rows.made, new)
    column, position = rows.tokens.shape[1] - new + place, jnp.sum(rows.real, axis=1)
    hidden, caches = {}, {}
    for name, policy in self.policies.items():
      cache, valid = read.caches[name], draws[:, None]
      states, caches[name] = policy.decode(
        params[name], token[:, None], position[:, None], valid, cache, column
      )
      hidden[name] = states[:, 0]
    rows = rows._replace(
      tokens=_put(rows.tokens, column, token),
      real=_put(rows.real, column, draws),
      logp=_put(rows.logp, place, logp),
      versions=_put(rows.versions, place, jnp.full_like(rows.made, version)),
      made=rows.made + draws,
      over=rows.over | (draws & (stopped | (rows.made + 1 == new))),
      finished=rows.finished | (draws & stopped),
      seen=jnp.where(draws, seen, rows.seen),
    )
    return rows, Read(hidden, caches)


def running(rows: Rows) -> Array:
  """bool[B], the rows that get a token by the next draw."""
  return ~rows.over & (rows.begun != EMPTY)


def _put(x: Array, column: Array, value: Array) -> Array:
  """Writes value [B] to x [B, n], at a column i32[B] of each row; columns outside are dropped."""
  write = lambda x, column, value: x.at[column].set(value, mode='drop')
  return jax.vmap(write)(x, column, value)


def _by_row(tree: Any) -> Any:
  """Constrains first axes to the rows of the mesh, so that no program meets another layout."""
  return jax.tree.map(lambda x: constrain(x, ('batch', *('length',) * (x.ndim - 1))), tree)


class Reader:
  """Lets the models read the rows at the beginning of a piece, and keeps what they have read."""

  def __init__(self, sampler: ResumableSampler, mesh: Mesh | None, refill: bool):
    """See `make_resumable_sampler`."""
    self.kept: Kept | None = None  # of the piece before
    self._place = (lambda x: x) if mesh is None else functools.partial(place_batch, mesh)
    self._refill = refill
    self._read = Program(jit(sampler.read_rows))
    self._renew = jit(sampler.renew, donate_argnums=2)

  def __call__(
    self, params: dict[str, Params], rows: Rows, version: int
  ) -> tuple[dict[str, Params], Rows, Read]:
    """See `ResumableSampler.read_rows`; `rows` are NumPy."""
    before, self.kept = self.kept, None  # its caches are donated, or freed
    moved = before is not None and before.version != version
    continued = None
    if before is not None and not (moved and self._refill):
      continued = before.continued(rows)
    placed, version = self._place(rows), np.int32(version)
    if continued is None:
      del before
      return self._read(params, placed, version)
    asked = self._place(continued), np.bool_(moved)
    return self._renew(params, placed, before.read, version, *asked)


def make_resumable_sampler(
  policies: Mapping[str, Policy],
  *,
  max_new_tokens: int,
  behavior_policy: Callable[..., Array] = behavior_policies.current,
  default: Policy | None = None,
  samples_per_prompt: int = 1,
  stop_ids: Sequence[int] = (),
  stop_table: StopTable | None = None,
  pad_id: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  mesh: Mesh | None = None,
  refill: bool = True,
) -> Callable[..., Rows]:
  """Makes `sample(params, rows, *, seed, version, due, needed, chunk=0, stop=...) -> Rows`.

  It draws tokens of the `Rows` (NumPy) until `needed` prompts are complete, and so are those of `due`
  bool[F], or until all rows are over. Each of these tokens gets the number `version`. With a `chunk`,
  `stop(rows)` is asked after every `chunk` tokens a row, and True ends the piece.

  Settings are those of `make_sampler`, and so are the numbers: a token is drawn by a key of (seed, batch
  whose step drew the prompt, prompt id, sample index, position), and its `logp` is under exactly the
  distribution that it was drawn from. So rows that are drawn in pieces by the same parameters are
  those of `make_sampler`, up to rounding. A prompt is read once for each of its rows, not once for all.

  With a `chunk` the caches of a piece are kept for the next one. Pieces of one `version` have the same
  parameters, and continue with them.

  Args:
    refill: whether caches are filled anew when the version changes; False continues with the old ones.

  Raises:
    ValueError: a setting that `make_sampler` refuses.
  """
  sampler = configure(
    ResumableSampler,
    policies,
    mesh,
    default=default,
    max_new_tokens=max_new_tokens,
    behavior_policy=behavior_policy,
    samples_per_prompt=samples_per_prompt,
    slots=0,
    stop_ids=stop_ids,
    stop_table=stop_table,
    pad_id=pad_id,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    token_temperature=processors.unchanged,
  )
  following = stop_table.following if stop_table else None
  read = Reader(sampler, mesh, refill)
  # The rows are not donated, because the host looks at them.
  advance = jit(sampler.advance, donate_argnums=2)

  def sample(
    params: dict[str, Params],
    rows: Rows,
    *,
    seed: int,
    version: int,
    due: np.ndarray,
    needed: int,
    chunk: int = 0,
    stop: Callable[[Rows], bool] = lambda rows: False,
  ) -> Rows:
    def enough(rows: Rows) -> bool:
      done = complete(rows, samples_per_prompt)
      return bool(done.sum() >= needed and (done | ~due).all()) or not running(rows).any()

    if enough(rows):
      return rows
    # Columns that no prompt needs are not read. Caches that may outlive a change of weights have all.
    padding = spare_columns(rows.real[:, :-max_new_tokens]) if refill else 0
    part = rows._replace(tokens=rows.tokens[:, padding:], real=rows.real[:, padding:])
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      params, placed, seen = read(params, part, version)
      while True:
        asked = seed, np.int32(version), due, np.int32(needed), np.int32(chunk or max_new_tokens)
        placed, seen = advance(params, placed, seen, following, *asked)
        part = to_host(placed)
        if enough(part) or stop(part):
          break
    if chunk:
      read.kept = Kept(part, seen, version)
    joined = lambda whole, found: np.concatenate([whole[:, :padding], found], axis=1)
    return part._replace(tokens=joined(rows.tokens, part.tokens), real=joined(rows.real, part.real))

  return sample
