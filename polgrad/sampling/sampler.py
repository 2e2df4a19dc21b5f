"""Autoregressive sampling with a key-value cache, as one jitted function."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from polgrad.compiling import jit
from polgrad.models.policy import Policy
from polgrad.registry import inputs
from polgrad.sampling import behavior_policies, processors
from polgrad.sharding import data_parallel_size, place_batch
from polgrad.types import Array, Params, Rollout


def make_sampler(
  policies: Mapping[str, Policy],
  *,
  max_new_tokens: int,
  behavior_policy: Callable = behavior_policies.current,
  default: Policy | None = None,
  samples_per_prompt: int = 1,
  slots: int = 0,
  stop_ids: Sequence[int] = (),
  pad_id: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  mesh: Mesh | None = None,
) -> Callable:
  """Makes `sample(params, tokens, mask, prompt_ids, *, seed, step, policy_step=0) -> Rollout`.

  `params` holds a parameter set for every name that the behavior policy reads; `tokens`
  i32[N, Tp] and `mask` bool[N, Tp] are left-padded prompts, so that completions begin at column Tp
  in every row. The rollout has B = N * samples_per_prompt rows, prompt-major, and
  T = Tp + max_new_tokens columns. `seed` and `step` may change freely. Prompts are trimmed to the
  longest of the call, rounded up to Tp / 4, Tp / 2 or Tp, so at most three shapes compile.
  `policy_step` is only recorded.

  The distribution is softmax(top_p(top_k(behavior_policy(logits) / temperature))), and
  `behavior_logp` is its log-probability of the token that was drawn; the trainer sees the same
  number at the same temperature if top_k and top_p are off. Every draw has its own key, folded
  from (seed, step, prompt id, sample index, position in the completion): a completion depends
  neither on the batch nor on the slot that it was sampled in. The stop token is part of the
  completion. A row that meets none in `max_new_tokens` is not `finished`. After the end there are
  `pad_id`, segment 0 and a False mask.

  Args:
    policies: models by the names that the behavior policy reads; their vocabularies must agree.
    max_new_tokens: longest completion.
    behavior_policy: logits by name -> logits, see `behavior_policies`.
    default: the model of all names that `policies` lacks.
    samples_per_prompt: samples a prompt; the prompt is read once for all.
    slots: rows that are decoded at a time; where some have ended, the next ones take their places.
      Pays off when few rows are long, and bounds the caches. 0 decodes all rows at once.
    stop_ids: tokens that end a completion.
    pad_id: fills what no row uses; it may be a stop id.
    temperature: divides the logits of the behavior policy.
    top_k: keeps the k most likely tokens; 0 keeps all.
    top_p: keeps the most likely tokens with this mass; 1 keeps all.
    mesh: devices to spread the prompts over, which then come from the host.

  Raises:
    ValueError: a setting out of range, a name that the behavior policy reads and no model has, slots
      or (from `sample`) prompts that do not divide over the mesh.
  """
  names = inputs(behavior_policy)
  policies = {n: policies.get(n, default) for n in names}
  queues = 1 if mesh is None else data_parallel_size(mesh)
  _check(policies, max_new_tokens, samples_per_prompt, slots, queues, temperature, top_k, top_p)
  process = [functools.partial(processors.temperature, value=temperature)]
  if top_k:
    process.append(functools.partial(processors.top_k, k=top_k))
  if top_p < 1:
    process.append(functools.partial(processors.top_p, p=top_p))
  # Every share of the mesh has its own queue and slots, so that no cache moves between devices.
  fold = lambda x: x.reshape(queues, -1, *x.shape[1:])
  unfold = lambda x: x.reshape(-1, *x.shape[2:])

  def distribution(params, hidden):
    logits = behavior_policy(*(policies[n].unembed(params[n], hidden[n]) for n in names))
    for processor in process:
      logits = processor(logits)
    return jax.nn.log_softmax(logits, axis=-1)

  def prefill(params, tokens, mask):
    """Reads every prompt once; hidden states of the last tokens, and caches."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, caches = {}, {}
    for n in names:
      cache = policies[n].init_cache(*tokens.shape)
      states, caches[n] = policies[n].decode(params[n], tokens, positions, mask, cache, 0)
      hidden[n] = states[:, -1]
    return hidden, caches

  @functools.partial(jit, static_argnames='padding')
  def run(params, tokens, mask, prompt_ids, seed, step, policy_step, *, padding: int) -> Rollout:
    prompts, width = tokens.shape
    rows = prompts * samples_per_prompt
    end = rows // queues  # rows are numbered within their share; this number is no row
    at_once = min(slots or rows, rows)
    patience = max(1, at_once // queues // 8)  # idle slots of a share before it reads prompts again
    params = {n: policies[n].unstack(params[n]) for n in names}
    repeat = lambda x: jnp.repeat(x, samples_per_prompt, axis=0)
    keys = _row_keys(
      seed, step, repeat(prompt_ids), jnp.tile(jnp.arange(samples_per_prompt), prompts)
    )
    of_prompt = dict(zip(('hidden', 'caches'), prefill(params, tokens, mask)))
    of_prompt['length'] = jnp.sum(mask, axis=1)
    stops = jnp.array(stop_ids, jnp.int32)[None]

    def pick(x, index):
      """Of [all, ...] what every slot asks for by its number in the share: [slots, ...]."""
      index = jnp.minimum(index, len(x) // queues - 1)
      return unfold(jax.vmap(lambda x, i: x[i])(fold(x), index))

    def put(x, state, value):
      """Writes a value of every slot to its row and place; slots without a row write nothing."""
      write = lambda x, row, place, value: x.at[row, place].set(value, mode='drop')
      return unfold(jax.vmap(write)(fold(x), state['row'], state['made'], fold(value)))

    def refill(state):
      """Gives slots without a row the next ones of the queue."""
      free = state['row'] == end
      upcoming = state['upcoming'][:, None] + jnp.cumsum(free, axis=1) - 1
      taken = free & (upcoming < end)
      row, new = jnp.where(taken, upcoming, state['row']), taken.reshape(-1)
      prompt = jax.tree.map(lambda x: pick(x, row // samples_per_prompt), of_prompt)
      begin = lambda n: policies[n].begin(state['caches'][n], prompt['caches'][n], new)
      swap = lambda a, b: jnp.where(new.reshape(-1, *(1,) * (b.ndim - 1)), a, b)
      return state | {
        'row': row,
        'made': jnp.where(taken, 0, state['made']),
        'upcoming': state['upcoming'] + jnp.sum(taken, axis=1),
        'length': swap(prompt['length'], state['length']),
        'hidden': {n: swap(prompt['hidden'][n], state['hidden'][n]) for n in names},
        'caches': {n: begin(n) for n in names},
      }

    def draw(state):
      """Draws the next token of every slot, then lets the models read it."""
      running, made = state['row'].reshape(-1) < end, state['made'].reshape(-1)
      log_probs = distribution(params, state['hidden'])
      token = _categorical(pick(keys, state['row']), made, log_probs)
      logp = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
      over = jnp.any(token[:, None] == stops, axis=1) | (made + 1 == max_new_tokens)
      hidden, caches = {}, {}
      for n in names:
        states, caches[n] = policies[n].decode(
          params[n],
          token[:, None],
          (state['length'] + made)[:, None],
          running[:, None],
          state['caches'][n],
          # A row lives for at most max_new_tokens steps, so it never meets its own columns again.
          width + state['step'] % max_new_tokens,
        )
        hidden[n] = states[:, 0]
      return state | {
        'step': state['step'] + 1,
        'row': jnp.where(fold(over), end, state['row']),
        'made': state['made'] + 1,
        'hidden': hidden,
        'caches': caches,
        'tokens': put(state['tokens'], state, token),
        'logp': put(state['logp'], state, logp),
        'drawn': put(state['drawn'], state, jnp.ones_like(running)),
      }

    def goes_on(state):
      idle = state['row'] == end
      served = (state['upcoming'] == end) | (jnp.sum(idle, axis=1) < patience)
      return ~jnp.all(idle) & jnp.all(served)

    state = jax.lax.while_loop(
      lambda s: jnp.any(s['row'] < end) | jnp.any(s['upcoming'] < end),
      lambda s: jax.lax.while_loop(goes_on, draw, refill(s)),
      {
        'step': jnp.int32(0),
        'row': jnp.full((queues, at_once // queues), end, jnp.int32),
        'made': jnp.zeros((queues, at_once // queues), jnp.int32),
        'upcoming': jnp.zeros(queues, jnp.int32),
        'length': jnp.zeros(at_once, jnp.int32),
        'hidden': jax.tree.map(
          lambda x: jnp.zeros((at_once, *x.shape[1:]), x.dtype), of_prompt['hidden']
        ),
        'caches': {n: policies[n].init_cache(at_once, width + max_new_tokens) for n in names},
        'tokens': jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
        'logp': jnp.zeros((rows, max_new_tokens), jnp.float32),
        'drawn': jnp.zeros((rows, max_new_tokens), bool),
      },
    )
    # From what was drawn, never from token ids alone: the pad id may be a stop id.
    seen = jnp.concatenate([repeat(mask), state['drawn']], axis=1)
    last = jnp.sum(state['drawn'], axis=1, keepdims=True) - 1
    last = jnp.take_along_axis(state['tokens'], last, axis=1)
    left = lambda x, by, fill: jnp.pad(x, ((0, 0), (by, 0)), constant_values=fill)
    texts = jnp.concatenate([repeat(jnp.where(mask, tokens, pad_id)), state['tokens']], axis=1)
    return Rollout(
      tokens=left(texts, padding, pad_id),
      segment_ids=left(seen, padding, False).astype(jnp.int32),
      mask=left(state['drawn'], padding + width, False),
      behavior_logp=left(state['logp'], padding + width, 0),
      finished=jnp.any(last == stops, axis=1),
      prompt_ids=repeat(prompt_ids),
      group_ids=repeat(jnp.arange(prompts)),
      policy_step=jnp.full(rows, policy_step, jnp.int32),
    )

  def sample(
    params: dict[str, Params], tokens, mask, prompt_ids, *, seed, step, policy_step=0
  ) -> Rollout:
    padding = tokens.shape[1] - _bucket(int(np.max(np.sum(mask, axis=1))), tokens.shape[1])
    prompts = (tokens[:, padding:], mask[:, padding:], prompt_ids)
    if mesh is None:
      return run(params, *prompts, seed, step, policy_step, padding=padding)
    with jax.set_mesh(mesh):
      return run(params, *place_batch(mesh, prompts), seed, step, policy_step, padding=padding)

  return sample


def _bucket(needed: int, width: int) -> int:
  """The least of `width`, its half and its quarter (rounded up) that `needed` columns fit into."""
  return min(size for size in (width, -(-width // 2), -(-width // 4)) if size >= needed)


def _row_keys(seed: Any, step: Any, prompt_ids: Array, sample_indices: Array) -> Array:
  key = jax.random.fold_in(jax.random.key(seed), step)
  fold = lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
  return jax.vmap(fold)(prompt_ids, sample_indices)


def _categorical(keys: Array, positions: Array, log_probs: Array) -> Array:
  """One token a row by its largest log-prob + Gumbel noise, with the key of row and position."""
  fold = jax.vmap(jax.random.fold_in)
  draw = jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))
  scores = log_probs + draw(fold(keys, positions))
  # What argmax finds, in two reductions of numbers: one of pairs runs a number at a time on CPUs.
  best = scores == jnp.max(scores, axis=1, keepdims=True)
  places = jnp.arange(scores.shape[1], dtype=jnp.int32)
  return jnp.min(jnp.where(best, places, scores.shape[1] - 1), axis=1)


def _check(policies, max_new_tokens, samples_per_prompt, slots, queues, temperature, top_k, top_p):
  missing = sorted(n for n, policy in policies.items() if policy is None)
  if missing:
    raise ValueError(f'the behavior policy reads {missing}, but there is no model of that name')
  sizes = {n: policy.config.vocab_size for n, policy in policies.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(f'the vocabularies of the behavior policy differ: {sizes}')
  if max_new_tokens < 1 or samples_per_prompt < 1:
    raise ValueError('max_new_tokens and samples_per_prompt must be at least 1')
  if slots < 0 or slots % queues:
    raise ValueError(
      f'slots must be 0 or a multiple of the data-parallel size {queues}, got {slots}'
    )
  if temperature <= 0:
    raise ValueError(
      f'temperature must be positive, got {temperature}; use behavior_policies.greedy for 0'
    )
  if top_k < 0 or not 0 < top_p <= 1:
    raise ValueError(f'need top_k >= 0 and 0 < top_p <= 1, got {top_k} and {top_p}')
