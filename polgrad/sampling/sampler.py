"""The entry point of sampling: from settings to a function that draws completions.

The compiled program behind it is `decoding.Sampler.run`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from polgrad.compiling import Program, jit
from polgrad.models.policy import Policy
from polgrad.sampling import behavior_policies, processors
from polgrad.sampling.decoding import Sampler
from polgrad.sampling.speculation import Proposer, SpeculativeSampler
from polgrad.sampling.stopping import StopTable
from polgrad.sharding import data_parallel_size, place_batch
from polgrad.types import Array, Batch, Params


def make_sampler(
  policies: Mapping[str, Policy],
  *,
  max_new_tokens: int,
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
  speculate: Proposer | None = None,
  mesh: Mesh | None = None,
) -> Callable[..., Batch]:
  """Makes `sample(params, tokens, mask, prompt_ids, *, seed, step) -> Batch`.

  `params` holds one parameter set for every name that the behavior policy reads. `tokens` i32[N, Tp]
  and `mask` bool[N, Tp] are left-padded prompts, so every completion begins at column Tp;
  `prompt_ids` i32[N] are the prompts' rows in the data set.

  The batch has B = N * samples_per_prompt rows, prompt-major, and T = Tp + max_new_tokens columns.
  A stop token is part of its completion; a row without one (or a stop string) after `max_new_tokens`
  tokens is not `finished`. After the completion a row holds `pad_id`, segment 0 and a False mask.

  Tokens are drawn from softmax(top_p(top_k(token_temperature(behavior_policy(logits) / temperature)))),
  and `behavior_logp` is the log-probability of a token under exactly this distribution. With top_k,
  top_p and token_temperature off it is what the trainer computes at the same temperature. Each draw has
  its own random key, folded from (seed, step, prompt id, sample index, position in the completion), so
  a completion depends neither on the rest of the batch nor on its slot.

  New values of `seed` and `step` do not recompile. Prompts are trimmed to the longest of
  the call, rounded up to Tp / 4, Tp / 2 or Tp. The tokens that all prompts of the call begin with, such
  as worked examples, are read once, in quarters of that width. So few programs compile for one N and Tp.

  Args:
    policies: models by the names that the behavior policy reads; their vocabularies must agree.
    max_new_tokens: number of tokens in the longest completion.
    behavior_policy: logits of the named parameter sets -> logits, see `behavior_policies`.
    default: model for the names that `policies` lacks.
    samples_per_prompt: completions of each prompt; the models read the prompt once for all of them.
    slots: number of rows that are decoded at a time, over all devices; when some of them have ended,
      the next rows take their places. Saves time when few rows are long, and bounds the caches.
      0 (the default) decodes all rows at once.
    stop_ids: tokens that end a completion.
    stop_table: of texts that end a completion, see `stopping`; the token that completes one is the last.
    pad_id: token of padding; it may be one of `stop_ids`.
    temperature: divides the logits of the behavior policy.
    top_k: number of most likely tokens that are kept; 0 keeps all.
    top_p: probability of the most likely tokens that are kept; 1 keeps all.
    token_temperature: logits -> logits, see `processors.TABLE`. If it reads `entropy_levels`, `params`
      has an entry f32[3] of this name.
    speculate: what proposes tokens, several of which are then checked in one pass, see `speculation`. It
      changes no completion. The batch then has the feature `passes` i32[B]. None: nothing does.
    mesh: devices to spread the prompts over; prompts are then arrays on the host.

  Raises:
    ValueError: a setting is out of range; a name that the behavior policy reads has no model; the
      slots, or (from `sample`) the prompts, do not divide over the mesh.
  """
  sampler = configure(
    Sampler,
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
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    token_temperature=token_temperature,
    speculate=speculate,
  )
  following = stop_table.following if stop_table else None
  run = Program(jit(sampler.run, static_argnames=('padding', 'common')))

  def sample(params: dict[str, Params], tokens, mask, prompt_ids, *, seed, step) -> Batch:
    padding = spare_columns(mask)
    prompts = (tokens[:, padding:], mask[:, padding:], prompt_ids)
    sizes = dict(padding=padding, common=common_tokens(*prompts[:2]))
    if mesh is None:
      return run(params, *prompts, seed, step, following, **sizes)
    with jax.set_mesh(mesh):
      return run(params, *place_batch(mesh, prompts), seed, step, following, **sizes)

  return sample


def configure(
  kind: type[Sampler],
  policies: Mapping[str, Policy],
  mesh: Mesh | None,
  *,
  default: Policy | None,
  behavior_policy: Callable[..., Array],
  stop_ids: Sequence[int],
  temperature: float,
  top_k: int,
  top_p: float,
  token_temperature: Callable[..., Array],
  speculate: Proposer | None = None,
  **fields,
) -> Sampler:
  """The sampler of these settings, see `make_sampler`.

  Args:
    kind: its class; with `speculate` it is `SpeculativeSampler`.
    fields: fields of the class that are settings, unchanged.

  Raises:
    ValueError: a setting that `make_sampler` refuses.
  """
  queues = 1 if mesh is None else data_parallel_size(mesh)
  names = behavior_policies.models_read(behavior_policy)
  if speculate:
    kind, fields = SpeculativeSampler, {**fields, 'proposer': speculate}
    names += speculate.reads
  policies = {name: policies.get(name, default) for name in names}
  sampler = kind(
    policies=policies,
    behavior_policy=behavior_policy,
    processors=chosen_processors(temperature, top_k, top_p, token_temperature),
    queues=queues,
    stop_ids=tuple(stop_ids),
    **fields,
  )
  _check(sampler, temperature, top_k, top_p)
  if speculate:
    speculate.check(sampler.policies, sampler.drawn_from)
  return sampler


def laid_out(
  tokens: np.ndarray,
  mask: np.ndarray,
  prompt_ids: Sequence[int],
  made: np.ndarray,
  logp: np.ndarray,
  drawn: np.ndarray,
  finished: np.ndarray,
  *,
  pad_id: int,
  samples: int = 1,
) -> Batch:
  """The batch of prompts and completions that were drawn elsewhere, as `make_sampler` lays it out.

  Args:
    tokens: prompts i32[N, Tp], left-padded.
    mask: bool[N, Tp], False on padding.
    prompt_ids: of the prompts, [N].
    made: tokens of the completions i32[B, new], prompt-major, `pad_id` behind their ends.
    logp: their log-probs f32[B, new], 0 behind the ends.
    drawn: bool[B, new], True on tokens of completions.
    finished: bool[B], whether a completion has ended.
    pad_id: token of padding.
    samples: completions of a prompt.
  """
  repeat = lambda x: np.repeat(np.asarray(x), samples, axis=0)
  join = lambda first, rest: np.concatenate([first, rest], axis=1)
  tokens, mask = repeat(tokens), repeat(mask)
  nothing = np.zeros(mask.shape, bool)
  return Batch(
    tokens=join(np.where(mask, tokens, pad_id), made),
    segment_ids=join(mask, drawn).astype(np.int32),
    mask=join(nothing, drawn),
    behavior_logp=join(nothing.astype(np.float32), logp),
    finished=finished,
    prompt_ids=repeat(prompt_ids),
    group_ids=repeat(np.arange(len(prompt_ids), dtype=np.int32)),
  )


def spare_columns(mask: Array) -> int:
  """Columns on the left of bool[N, Tp] that no prompt needs: after trimming, few widths are left."""
  width = mask.shape[1]
  return width - _bucket(int(np.max(np.sum(mask, axis=1))), width)


def common_tokens(tokens: Array, mask: Array) -> int:
  """How many first tokens of left-padded prompts are read once for all of them.

  It is a multiple of a quarter of the width, so that few programs compile, and less than the length of
  every prompt. 0: fewer than that are equal, or there is one prompt.

  >>> common_tokens(np.array([[0, 7, 8, 9], [7, 8, 5, 6]]), np.array([[0, 1, 1, 1], [1, 1, 1, 1]]))
  2
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
  quarter, shortest = -(-tokens.shape[1] // 4), int(mask.sum(axis=1).min())
  if len(tokens) == 1 or shortest <= quarter:
    return 0
  begun = np.argmax(mask, axis=1)[:, None] + np.arange(shortest - 1)[None]
  same = (np.take_along_axis(tokens, begun, axis=1) == tokens[0, begun[0]]).all(axis=0)
  return int(np.cumprod(same).sum()) // quarter * quarter


def behavior_at(temperature: float) -> tuple[Callable, float]:
  """Behavior policy and temperature for `make_sampler`, where a temperature of 0 means greedy."""
  if temperature:
    return behavior_policies.current, temperature
  return behavior_policies.greedy, 1.0


def chosen_processors(
  temperature: float,
  top_k: int,
  top_p: float,
  token_temperature: Callable[..., Array] = processors.unchanged,
) -> list[Callable[..., Array]]:
  """The processors that these settings turn on, in the order in which they are applied."""
  chosen = [functools.partial(processors.temperature, value=temperature), token_temperature]
  if top_k:
    chosen.append(functools.partial(processors.top_k, k=top_k))
  if top_p < 1:
    chosen.append(functools.partial(processors.top_p, p=top_p))
  return chosen


def _bucket(needed: int, width: int) -> int:
  """The least of `width`, its half and its quarter (rounded up) that `needed` columns fit into."""
  return min(size for size in (width, -(-width // 2), -(-width // 4)) if size >= needed)


def _check(sampler: Sampler, temperature: float, top_k: int, top_p: float) -> None:
  """Refuses settings that have no meaning, see `make_sampler`."""
  missing = sorted(n for n, policy in sampler.policies.items() if policy is None)
  if missing:
    raise ValueError(f'the behavior policy reads {missing}, but there is no model of that name')
  sizes = {n: policy.config.vocab_size for n, policy in sampler.policies.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(f'the vocabularies of the behavior policy differ: {sizes}')
  if sampler.max_new_tokens < 1 or sampler.samples_per_prompt < 1:
    raise ValueError('max_new_tokens and samples_per_prompt must be at least 1')
  slots, queues = sampler.slots, sampler.queues
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
