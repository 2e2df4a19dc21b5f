"""Block-wise controlled decoding: continue with the best of several blocks (arXiv:2310.17022).

From every prompt K continuations of M tokens are drawn from the model, the one with the largest value is
appended, and so on until a stop token. With M = max_new_tokens it is best-of-K.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.compiling import jit
from polgrad.losses import logit_stats
from polgrad.models.policy import Policy
from polgrad.models.token_stats import token_stats
from polgrad.sampling.sampler import make_sampler
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Params

Score = Callable[[Batch], Array]  # rows [B] of prompts and partial completions -> values [B]


def make_block_sampler(
  policies: Mapping[str, Policy],
  *,
  score: Score,
  candidates: int,
  block_tokens: int,
  max_new_tokens: int,
  pad_id: int = 0,
  **settings,
) -> Callable[..., Batch]:
  """Makes `sample(params, tokens, mask, prompt_ids, *, seed, step) -> Batch`, one row a prompt.

  Arguments and result are those of the function that `make_sampler` makes. `behavior_logp` is the
  log-probability of a token under the model from which blocks are drawn, not under the block-wise
  distribution. With b blocks, KL(block-wise || model) <= b (log K - (K - 1) / K).

  Stop strings are not supported: rows end with one of `stop_ids`.

  Args:
    policies: models by the names that the behavior policy reads, as in `make_sampler`.
    score: the value of each candidate: of `prefix_value`, several of these added up, or a verifier's. It
      gets rows that are as long as all candidates of this block.
    candidates: K, continuations to choose from.
    block_tokens: M, tokens of a block; it divides `max_new_tokens`.
    max_new_tokens: tokens of the longest completion.
    pad_id: token of padding.
    settings: of `make_sampler`.

  Raises:
    ValueError: a number below 1, blocks that do not fill `max_new_tokens`, or a setting that
      `make_sampler` refuses.
  """
  if block_tokens < 1 or max_new_tokens % block_tokens:
    raise ValueError(
      f'block_tokens must divide max_new_tokens {max_new_tokens}, got {block_tokens}'
    )
  blocks = max_new_tokens // block_tokens
  draw = make_sampler(
    policies,
    samples_per_prompt=candidates,
    max_new_tokens=block_tokens,
    pad_id=pad_id,
    **settings,
  )

  def sample(params, tokens, mask, prompt_ids, *, seed, step) -> Batch:
    prompts, width = tokens.shape
    shape = (prompts, max_new_tokens)
    made = np.full(shape, pad_id, np.int32)
    logp, drawn = np.zeros(shape, np.float32), np.zeros(shape, bool)
    finished = np.zeros(prompts, bool)
    for block in range(blocks):
      start, end = block * block_tokens, (block + 1) * block_tokens
      # All rows that continue have `start` tokens, so texts stay left-padded. The columns on the left
      # fill up to one width for all blocks, so few programs compile.
      fill = ((0, 0), (max_new_tokens - start, 0))
      text = np.pad(np.concatenate([np.asarray(tokens), made[:, :start]], 1), fill)
      seen = np.pad(np.concatenate([np.asarray(mask), drawn[:, :start]], 1), fill)
      number = (step * blocks + block) % 2**31  # so that blocks draw different noise
      rows = to_host(draw(params, text, seen, prompt_ids, seed=seed, step=number))
      best = np.asarray(score(rows)).reshape(prompts, candidates).argmax(axis=1)
      chosen = jax.tree.map(lambda x, best=best: x[np.arange(prompts) * candidates + best], rows)
      # Rows that have ended were drawn too, because shapes are fixed; their draws are dropped.
      new = slice(width + max_new_tokens, None)
      drawn[:, start:end] = chosen.mask[:, new] & ~finished[:, None]
      made[:, start:end] = np.where(drawn[:, start:end], chosen.tokens[:, new], pad_id)
      logp[:, start:end] = np.where(drawn[:, start:end], chosen.behavior_logp[:, new], 0)
      finished |= chosen.finished
      if finished.all():
        break
    return _batch(tokens, mask, prompt_ids, made, logp, drawn, finished, pad_id)

  return sample


def prefix_value(policy: Policy, params: Params) -> Score:
  """The value that a scorer gives to the prompt with all tokens of the row so far, [B].

  Args:
    policy, params: the scorer, trained by `methods.cd_fudge` or `methods.cd_q`.
  """

  def value(params: Params, tokens: Array, segment_ids: Array, mask: Array) -> Array:
    stats = token_stats(
      policy.hidden(params, tokens, segment_ids),
      tokens,
      functools.partial(policy.unembed, params),
      stats={'value': logit_stats.token_logit},
    )
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), mask.shape)
    last = jnp.max(jnp.where(mask, places, 0), axis=1, keepdims=True)
    return jnp.take_along_axis(stats['value'], last, axis=1)[:, 0]

  value = jit(value)
  return lambda batch: value(params, batch.tokens, batch.segment_ids, batch.mask)


def _batch(tokens, mask, prompt_ids, made, logp, drawn, finished, pad_id) -> Batch:
  """The batch of prompts and completions, laid out as by `make_sampler`."""
  tokens, mask = np.asarray(tokens), np.asarray(mask)
  join = lambda first, rest: np.concatenate([first, rest], axis=1)
  nothing = np.zeros(mask.shape, bool)
  return Batch(
    tokens=join(np.where(mask, tokens, pad_id), made),
    segment_ids=join(mask, drawn).astype(np.int32),
    mask=join(nothing, drawn),
    behavior_logp=join(nothing.astype(np.float32), logp),
    finished=finished,
    prompt_ids=np.asarray(prompt_ids),
    group_ids=np.arange(len(tokens), dtype=np.int32),
  )
