"""Speculative decoding: tokens are proposed, and the models check several of them in one pass.

arXiv:2211.17192, arXiv:2302.01318. A proposer guesses the next k tokens of a row, and the models read
them all at once, which costs little more than one token where the time is spent on reading weights. Then
the sampler draws its own token in each of these places, with the random key that the place has anyway.
Draws count as long as they are what was proposed; the first one that differs counts too:

    proposed     p1  p2  p3  p4
    drawn        p1  p2  x3          3 tokens in one pass, of at most 5

So a row is the one that the sampler draws without proposals, token by token, up to the rounding of
logits. No token is taken from the proposer, and `behavior_logp` is that of a draw without proposals.

A proposer that draws uses the Gumbel noise of the sampler (arXiv:2408.07978): where two distributions P
and Q are similar, their largest sums of log-probability and noise are often at the same token, with a
probability of at least (1 - TV) / (1 + TV), where TV is the total variation distance of P and Q. (On a
CPU the sampler may draw a group of tokens and then one of them; the bound holds for each of the draws.)
Rejection sampling has 1 - TV, but there a row depends on what was proposed. If the proposal is not
random, both are the probability of the proposed token.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from polgrad.models.first_layers import first_layers
from polgrad.models.policy import Policy
from polgrad.registry import AtLeastOne, table
from polgrad.sampling import behavior_policies
from polgrad.sampling.decoding import Decoding, Prefilled, Sampler, drawn, gumbel, put, take
from polgrad.types import Array, Batch, Params


class Speculation:
  """Whether tokens are proposed, and by what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Off(Speculation):
  """Nothing is proposed: a pass draws one token of each row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposer(Speculation, abc.ABC):
  """What proposes tokens, and how many in a pass."""

  # Tokens that are proposed for each row in a pass, so a pass reads one more and draws at most one more.
  tokens: AtLeastOne = 4

  @property
  def reads(self) -> tuple[str, ...]:
    """Names of the parameter sets that it reads besides those of the behavior policy."""
    return ()

  def check(self, models: Mapping[str, Policy], drawn_from: Sequence[str]) -> None:
    """Refuses models that it cannot propose with.

    Args:
      models: by the names of parameter sets.
      drawn_from: the parameter sets of the behavior policy.

    Raises:
      ValueError: names the setting.
    """

  @abc.abstractmethod
  def propose(
    self, sampler: 'SpeculativeSampler', drawing: 'Drawing', state: Decoding
  ) -> tuple[Array, dict[str, Any]]:
    """Guesses the next tokens of the row in each slot.

    Returns:
      i32[Q * S, tokens], and the caches of `state` with what was read for it.
    """


class Drawing(NamedTuple):
  """What a pass reads besides the state."""

  params: dict[str, Params]  # unstacked, by parameter set
  width: int  # columns of the prompts
  noise: Array  # f32[Q * S, tokens + 1, k], of `decoding.gumbel`, for the next tokens of each slot


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGram(Proposer):
  """Proposes how the row continued where its last tokens occurred before: prompt lookup.

  The longest match of at most `longest` tokens counts, and the latest of equally long ones. Where the
  continuation reaches the end of the row, it repeats. Without a match the last token is proposed again.
  It needs no model, and helps where completions copy: edits of code, quotes, steps of arithmetic.
  """

  # Tokens at the end of a row that are looked for in it.
  longest: AtLeastOne = 3

  def propose(
    self, sampler: 'SpeculativeSampler', drawing: Drawing, state: Decoding
  ) -> tuple[Array, dict[str, Any]]:
    last = drawing.width - 1 + state.made.reshape(-1)
    return continued(state.text, last, tokens=self.tokens, longest=self.longest), state.caches


def continued(text: Array, last: Array, *, tokens: int, longest: int) -> Array:
  """How rows would continue if they repeated themselves, see `NGram`.

  Args:
    text: token ids i32[n, L]; negative where there is none.
    last: i32[n], column of the newest token.
    tokens: how many to guess.
    longest: tokens of the longest match.

  Returns:
    i32[n, tokens]

  >>> continued(jnp.array([[5, 1, 2, 3, 4, 1, 2, -1]]), jnp.array([6]), tokens=6, longest=3).tolist()
  [[3, 4, 1, 2, 3, 4]]
  """
  columns = jnp.arange(text.shape[1])[None]
  # How many tokens up to each column are those up to the last one.
  same, size = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
  for back in range(longest):
    shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, : text.shape[1]]
    newest = jnp.take_along_axis(shifted, last[:, None], axis=1)
    same &= (shifted == newest) & (shifted >= 0)
    size += same
  score = jnp.where(columns < last[:, None], size * text.shape[1] + columns, -1)
  period = jnp.maximum(last - jnp.argmax(score, axis=1), 1)[:, None]
  source = last[:, None] - period + 1 + jnp.arange(tokens)[None] % period
  return jnp.take_along_axis(text, source, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstLayers(Proposer):
  """Proposes with the first layers of a model that the behavior policy reads, see `first_layers`.

  It needs neither another model nor a cache. The later layers are skipped, so a model that was not
  trained for it proposes well only with most of its layers.
  """

  # How many layers.
  layers: AtLeastOne = 1
  # The parameter set; '' is the first one of the behavior policy.
  model: str = ''

  def check(self, models: Mapping[str, Policy], drawn_from: Sequence[str]) -> None:
    if self.model and self.model not in drawn_from:
      raise ValueError(
        f'speculate.model: the behavior policy does not read {self.model!r}; valid: {sorted(drawn_from)}'
      )
    try:
      first_layers(models[self.model or drawn_from[0]], self.layers)
    except ValueError as error:
      raise ValueError(f'speculate.{error}') from error

  def propose(
    self, sampler: 'SpeculativeSampler', drawing: Drawing, state: Decoding
  ) -> tuple[Array, dict[str, Any]]:
    name = self.model or sampler.drawn_from[0]
    model = first_layers(sampler.policies[name], self.layers)
    return drafted(sampler, drawing, state, name, model, count=self.tokens, unread=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft(Proposer):
  """Proposes with another, smaller model: an anchor of the phase with the vocabulary of the policy.

  An anchor `optim.fixed` that is a `frozen` model of the phase is read from a Hugging Face folder. The
  model has a cache beside that of the policy.
  """

  # The anchor.
  model: str = 'draft'

  @property
  def reads(self) -> tuple[str, ...]:
    return (self.model,)

  def propose(
    self, sampler: 'SpeculativeSampler', drawing: Drawing, state: Decoding
  ) -> tuple[Array, dict[str, Any]]:
    model = sampler.policies[self.model]
    # If all proposals of the last pass were right, the model has not read the last one of them.
    return drafted(sampler, drawing, state, self.model, model, count=self.tokens, unread=2)


def drafted(
  sampler: 'SpeculativeSampler',
  drawing: Drawing,
  state: Decoding,
  name: str,
  model: Policy,
  *,
  count: int,
  unread: int,
) -> tuple[Array, dict[str, Any]]:
  """Proposals of a model, one token after the other, and the caches with what it has read.

  It draws as the sampler does, with the same processors and the same noise.

  Args:
    name: of its parameter set, and of its cache.
    count: tokens to propose.
    unread: the last tokens of the row that it reads first.
  """
  params, running = drawing.params[name], state.running.reshape(-1)
  made, behind = state.made.reshape(-1), drawing.width - state.length

  def read(tokens: Array, column: Array, cache: Any) -> tuple[Array, Any]:
    columns = column[:, None] + jnp.arange(tokens.shape[1])[None]
    valid = running[:, None] & (columns >= behind[:, None])
    positions = jnp.maximum(columns - behind[:, None], 0)
    states, cache = model.decode(params, tokens, positions, valid, cache, column)
    return states[:, -1], cache

  def draw(hidden: Array, number: Array | int) -> Array:
    logits = model.unembed(params, hidden)
    log_probs = sampler.shaped(drawing.params, dict.fromkeys(sampler.drawn_from, logits))
    return drawn(log_probs, drawing.noise[:, number])

  def step(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
    hidden, cache = carry
    token = draw(hidden, number)
    return read(token[:, None], drawing.width + made + number, cache), token

  first = drawing.width + made - unread
  hidden, cache = read(texts(state.text, first, unread), first, state.caches[name])
  (hidden, cache), tokens = jax.lax.scan(step, (hidden, cache), jnp.arange(count - 1))
  tokens = jnp.concatenate([tokens.T, draw(hidden, count - 1)[:, None]], axis=1)
  return tokens, {**state.caches, name: cache}


def texts(text: Array, first: Array, count: int) -> Array:
  """Tokens of rows [n, L] in `count` columns from `first` i32[n] on; 0 where there is none."""
  columns = first[:, None] + jnp.arange(count)[None]
  return jnp.maximum(jnp.take_along_axis(text, jnp.maximum(columns, 0), axis=1), 0)


def counted(token: Array, proposed: Array, stopped: Array, left: Array) -> tuple[Array, Array]:
  """How many draws of a pass count, and whether the row ends with a stop.

  A draw counts if all draws before it are what was proposed, and none of them ends the row.

  Args:
    token: i32[n, k + 1], the draws.
    proposed: i32[n, k].
    stopped: bool[n, k + 1], which draws end the row.
    left: i32[n], how many tokens the row may still get.

  Returns:
    i32[n], from 1 to k + 1 and at most `left`; bool[n].

  >>> count = lambda *x: [y.item() for y in counted(*map(jnp.array, x))]
  >>> count([[5, 6, 7]], [[5, 9]], [[False, False, True]], [8])
  [2, False]
  >>> count([[5, 6, 7]], [[5, 6]], [[False, True, False]], [8])
  [2, True]
  >>> count([[5, 6, 7]], [[5, 6]], [[False, True, False]], [1])
  [1, False]
  """
  counts = jnp.cumprod((token[:, :-1] == proposed) & ~stopped[:, :-1], axis=1)
  count = jnp.minimum(1 + jnp.sum(counts, axis=1), left)
  ended = jnp.any(stopped & (jnp.arange(token.shape[1])[None] < count[:, None]), axis=1)
  return count, ended


TABLE = table('speculation', Off, NGram, FirstLayers, Draft)
Part = Annotated[Speculation, TABLE]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SpeculativeSampler(Sampler):
  """Settings of a sampler whose models check proposals, and the steps of its program as methods.

  The newest token of a row is in `Decoding.text`, but the models have not read it yet: they read it
  together with the proposals. Of a row without drawn tokens it is the last one of the prompt. In the
  caches, the tokens of a row have the columns that they have in its row of the batch. Columns of
  proposals that were not drawn are written again by the next pass, before any token sees them.
  """

  proposer: Proposer

  @property
  def drawn_from(self) -> tuple[str, ...]:
    """The parameter sets of the behavior policy."""
    return behavior_policies.models_read(self.behavior_policy)

  def prefill(
    self, params: dict[str, Params], tokens: Array, mask: Array, common: int = 0
  ) -> Prefilled:
    prompts = super().prefill(params, tokens, mask, common)
    return prompts._replace(hidden={}, text=jnp.where(mask, tokens, -1))

  def start(self, prompts: Prefilled, prompt_width: int) -> Decoding:
    state = super().start(prompts, prompt_width)
    slots, columns = len(state.length), prompt_width + self.max_new_tokens
    return state._replace(
      text=jnp.full((slots, columns), -1, jnp.int32), began=jnp.zeros_like(state.drawn)
    )

  def refill(self, prompts: Prefilled, state: Decoding) -> Decoding:
    filled = super().refill(prompts, state)
    taken = (state.idle & filled.running).reshape(-1, 1)
    text = take(prompts.text, filled.row // self.samples_per_prompt)
    text = jnp.pad(text, ((0, 0), (0, self.max_new_tokens)), constant_values=-1)
    return filled._replace(text=jnp.where(taken, text, state.text))

  def draw(
    self,
    params: dict[str, Params],
    keys: Array,
    following: Array | None,
    prompt_width: int,
    state: Decoding,
  ) -> Decoding:
    """Draws the next tokens of every slot: at least one, and at most one more than were proposed."""
    drawing = Drawing(params, prompt_width, self.noise(keys, state))
    proposed, caches = self.proposer.propose(self, drawing, state)
    hidden, caches = self.check_proposed(params, proposed, prompt_width, state, caches)
    log_probs = self.distribution(params, hidden)
    token = drawn(log_probs, drawing.noise)
    logp = jnp.take_along_axis(log_probs, token[..., None], axis=2)[..., 0]
    stopped, seen = self.stops(following, state, token)
    left = self.max_new_tokens - state.made.reshape(-1)
    count, ended = counted(token, proposed, stopped, left)
    running = state.running.reshape(-1)
    over = running & (ended | (count == left))
    if self.stop_table:
      seen = jnp.take_along_axis(seen, count[:, None], axis=1).reshape(state.seen.shape)
    return self.written(state, token, logp, count, prompt_width)._replace(
      step=state.step + 1,
      row=jnp.where(over.reshape(state.row.shape), state.end, state.row),
      made=state.made + jnp.where(state.running, count.reshape(state.row.shape), 0),
      caches=caches,
      began=put(state.began, (state.row, state.made), running),
      finished=put(state.finished, (state.row, jnp.zeros_like(state.row)), ended),
      seen=seen,
    )

  def noise(self, keys: Array, state: Decoding) -> Array:
    """Noise of `decoding.gumbel` of the next tokens of every slot, f32[Q * S, tokens + 1, k]."""
    places = state.made.reshape(-1, 1) + jnp.arange(self.proposer.tokens + 1)[None]
    own = jnp.repeat(take(keys, state.row), places.shape[1], axis=0)
    size = next(iter(self.policies.values())).config.vocab_size
    return gumbel(own, places.reshape(-1), size).reshape(*places.shape, -1)

  def stops(
    self, following: Array | None, state: Decoding, token: Array
  ) -> tuple[Array, Array | None]:
    """Which tokens i32[Q * S, k] would end their row, and the states of the stop strings.

    Returns:
      bool[Q * S, k], and u8[Q * S, k + 1], before the first token and behind each; None without any.
    """
    stopped = self._is_stop(token.reshape(-1)).reshape(token.shape)
    if not self.stop_table:
      return stopped, None
    seen = [state.seen.reshape(-1)]
    for place in range(token.shape[1]):
      seen.append(following[seen[-1], token[:, place]])
    seen = jnp.stack(seen, axis=1)
    return stopped | (seen[:, 1:] == self.stop_table.end), seen

  def written(
    self, state: Decoding, token: Array, logp: Array, count: Array, prompt_width: int
  ) -> Decoding:
    """The state with the first `count` i32[Q * S] draws of every slot in its row and in its text."""
    places = jnp.arange(token.shape[1])[None]
    # Draws that do not count get a column that no row has.
    columns = state.made.reshape(-1, 1) + places
    columns = jnp.where(places < count[:, None], columns, self.max_new_tokens)
    where = (state.row[..., None], columns.reshape(*state.row.shape, -1))
    in_text = jnp.where(columns < self.max_new_tokens, prompt_width + columns, state.text.shape[1])
    put_text = lambda text, columns, token: text.at[columns].set(token, mode='drop')
    return state._replace(
      tokens=put(state.tokens, where, token),
      logp=put(state.logp, where, logp),
      drawn=put(state.drawn, where, jnp.ones(token.shape, bool)),
      text=jax.vmap(put_text)(state.text, in_text, token),
    )

  def check_proposed(
    self,
    params: dict[str, Params],
    proposed: Array,
    prompt_width: int,
    state: Decoding,
    caches: dict[str, Any],
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    """Lets the models read the newest token of every slot and what is proposed behind it.

    Returns:
      States from which the next tokens are drawn, [Q * S, tokens + 1, D] by parameter set; the caches.
    """
    first = prompt_width - 1 + state.made.reshape(-1)
    tokens = jnp.concatenate([texts(state.text, first, 1), jnp.maximum(proposed, 0)], axis=1)
    places = jnp.arange(tokens.shape[1])[None]
    positions = (state.length + state.made.reshape(-1))[:, None] - 1 + places
    valid = jnp.broadcast_to(state.running.reshape(-1, 1), tokens.shape)
    hidden, caches = {}, dict(caches)
    for name in self.drawn_from:
      hidden[name], caches[name] = self.policies[name].decode(
        params[name], tokens, jnp.maximum(positions, 0), valid, caches[name], first
      )
    return hidden, caches

  def finish(self, state: Decoding, *arguments: Any) -> Batch:
    """The batch, with the passes of each row as the feature `passes` i32[B]."""
    batch = super().finish(state, *arguments)
    return batch.with_arrays(passes=jnp.sum(state.began, axis=1, dtype=jnp.int32))
