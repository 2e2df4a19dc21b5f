"""Autoregressive sampling with a key-value cache, as one jitted function."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from polgrad.models.policy import Policy
from polgrad.registry import inputs
from polgrad.sampling import processors, roles
from polgrad.sharding import place_batch
from polgrad.types import Array, Params, Rollout


def make_sampler(
  policies: Mapping[str, Policy],
  *,
  max_new_tokens: int,
  role: Callable = roles.current,
  default: Policy | None = None,
  group_size: int = 1,
  stop_ids: Sequence[int] = (),
  pad_id: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  mesh: Mesh | None = None,
) -> Callable:
  """Makes `sample(params, tokens, mask, prompt_ids, *, seed, step, policy_step=0) -> Rollout`.

  `params` holds a parameter set for every name that the role reads; `tokens` i32[N, Tp] and `mask`
  bool[N, Tp] are left-padded prompts, so that completions begin at column Tp in every row. The
  rollout has B = N * group_size rows, prompt-major, and T = Tp + max_new_tokens columns. Shapes are
  static, so pad prompts to few different lengths; `seed` and `step` may change freely. `policy_step`
  is only written down.

  The distribution is softmax(top_p(top_k(role(logits) / temperature))), and `behavior_logp` is its
  log-probability of the token that was drawn; the trainer sees the same number at the same
  temperature if top_k and top_p are off. Every draw has its own key, folded from (seed, step,
  prompt id, sample index, position in the completion): a completion does not depend on the batch it
  was sampled in. The stop token is part of the completion. A row that meets none in
  `max_new_tokens` is not `finished`. After the end there are `pad_id`, segment 0 and a False mask.

  Args:
    policies: models by the names that the role reads; their vocabularies must agree.
    max_new_tokens: longest completion.
    role: logits by name -> logits, see `roles`.
    default: the model of all names that `policies` lacks.
    group_size: samples a prompt; the prompt is read once for all.
    stop_ids: tokens that end a completion.
    pad_id: fills what no row uses; it may be a stop id.
    temperature: divides the logits of the role.
    top_k: keeps the k most likely tokens; 0 keeps all.
    top_p: keeps the most likely tokens with this mass; 1 keeps all.
    mesh: devices to spread the prompts over, which then come from the host.

  Raises:
    ValueError: a setting out of range, a name that the role reads and no model has, or (from
      `sample`) prompts that do not divide over the mesh.
  """
  names = inputs(role)
  policies = {n: policies.get(n, default) for n in names}
  _check(policies, max_new_tokens, group_size, temperature, top_k, top_p)
  process = [functools.partial(processors.temperature, value=temperature)]
  if top_k:
    process.append(functools.partial(processors.top_k, k=top_k))
  if top_p < 1:
    process.append(functools.partial(processors.top_p, p=top_p))

  def distribution(params, hidden):
    logits = role(*(policies[n].unembed(params[n], hidden[n]) for n in names))
    for processor in process:
      logits = processor(logits)
    return jax.nn.log_softmax(logits, axis=-1)

  def prefill(params, tokens, mask):
    """Reads every prompt once; hidden state of its last token, and caches, for each sample."""
    rows, length = tokens.shape
    hidden, caches = {}, {}
    for n in names:
      cache = policies[n].init_cache(rows, length + max_new_tokens)
      states, cache = policies[n].decode(
        params[n], tokens, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), mask, cache, 0
      )
      hidden[n] = jnp.repeat(states[:, -1], group_size, axis=0)
      caches[n] = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), cache)
    return hidden, caches

  @jax.jit
  def run(params, tokens, mask, prompt_ids, seed, step, policy_step) -> Rollout:
    prompts, width = tokens.shape
    rows = prompts * group_size
    params = {n: policies[n].unstack(params[n]) for n in names}
    hidden, caches = prefill(params, tokens, mask)
    repeat = lambda x: jnp.repeat(x, group_size, axis=0)
    keys = _row_keys(seed, step, repeat(prompt_ids), jnp.tile(jnp.arange(group_size), prompts))
    prompt_lengths = repeat(jnp.sum(mask, axis=1))
    stops = jnp.array(stop_ids, jnp.int32)[None]

    def draw(state):
      """Draws token t of every row, then lets the models read it."""
      t = state['t']
      running = ~state['finished']
      log_probs = distribution(params, state['hidden'])
      drawn = _categorical(keys, t, log_probs)
      token = jnp.where(running, drawn, pad_id)
      logp = jnp.take_along_axis(log_probs, drawn[:, None], axis=1)[:, 0]
      hidden, caches = {}, {}
      for n in names:
        states, caches[n] = policies[n].decode(
          params[n],
          token[:, None],
          (prompt_lengths + t)[:, None],
          running[:, None],
          state['caches'][n],
          width + t,
        )
        hidden[n] = states[:, 0]
      return {
        't': t + 1,
        'finished': state['finished'] | jnp.any(token[:, None] == stops, axis=1) & running,
        'lengths': state['lengths'] + running,
        'tokens': state['tokens'].at[:, t].set(token),
        'logp': state['logp'].at[:, t].set(jnp.where(running, logp, 0)),
        'hidden': hidden,
        'caches': caches,
      }

    state = jax.lax.while_loop(
      lambda s: (s['t'] < max_new_tokens) & ~jnp.all(s['finished']),
      draw,
      {
        't': jnp.int32(0),
        'finished': jnp.zeros(rows, bool),
        'lengths': jnp.zeros(rows, jnp.int32),
        'tokens': jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
        'logp': jnp.zeros((rows, max_new_tokens), jnp.float32),
        'hidden': hidden,
        'caches': caches,
      },
    )
    # From lengths, never from token ids: the pad id may be a stop id.
    made = jnp.arange(max_new_tokens)[None] < state['lengths'][:, None]
    seen = jnp.concatenate([repeat(mask), made], axis=1)
    return Rollout(
      tokens=jnp.concatenate([repeat(jnp.where(mask, tokens, pad_id)), state['tokens']], axis=1),
      segment_ids=seen.astype(jnp.int32),
      mask=seen & (jnp.arange(seen.shape[1]) >= width)[None],
      behavior_logp=jnp.pad(state['logp'], ((0, 0), (width, 0))),
      finished=state['finished'],
      prompt_ids=repeat(prompt_ids),
      group_ids=repeat(jnp.arange(prompts)),
      policy_step=jnp.full(rows, policy_step, jnp.int32),
    )

  def sample(
    params: dict[str, Params], tokens, mask, prompt_ids, *, seed, step, policy_step=0
  ) -> Rollout:
    prompts = (tokens, mask, prompt_ids)
    if mesh is None:
      return run(params, *prompts, seed, step, policy_step)
    with jax.set_mesh(mesh):
      return run(params, *place_batch(mesh, prompts), seed, step, policy_step)

  return sample


def _row_keys(seed: Any, step: Any, prompt_ids: Array, sample_indices: Array) -> Array:
  key = jax.random.fold_in(jax.random.key(seed), step)
  fold = lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
  return jax.vmap(fold)(prompt_ids, sample_indices)


def _categorical(keys: Array, position: Array, log_probs: Array) -> Array:
  """One token a row, each with the key of its own row and position."""
  draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row)
  return jax.vmap(draw)(keys, log_probs).astype(jnp.int32)


def _check(policies, max_new_tokens, group_size, temperature, top_k, top_p):
  missing = sorted(n for n, policy in policies.items() if policy is None)
  if missing:
    raise ValueError(f'the role reads {missing}, but there is no model of that name')
  sizes = {n: policy.config.vocab_size for n, policy in policies.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(f'the vocabularies of the role differ: {sizes}')
  if max_new_tokens < 1 or group_size < 1:
    raise ValueError('max_new_tokens and group_size must be at least 1')
  if temperature <= 0:
    raise ValueError(f'temperature must be positive, got {temperature}; use the role greedy for 0')
  if top_k < 0 or not 0 < top_p <= 1:
    raise ValueError(f'need top_k >= 0 and 0 < top_p <= 1, got {top_k} and {top_p}')
