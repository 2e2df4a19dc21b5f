"""Block-wise controlled decoding: continue with the best of several blocks (arXiv:2310.17022).

From every prompt K continuations of M tokens are drawn from the model, the one with the largest value is
appended, and so on until a stop token. With M = max_new_tokens it is best-of-K.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.compiling import jit
from polgrad.losses import logit_stats
from polgrad.models.policy import Policy
from polgrad.models.token_stats import token_stats, unembedding
from polgrad.sampling.sampler import behavior_at, laid_out, make_sampler
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Params

WIDTH = 64  # the columns of a single prompt are a multiple of this, so few programs compile
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
      fill = ((0, 0), (max_new_tokens - end, 0))
      text = np.pad(np.concatenate([np.asarray(tokens), made[:, :start]], 1), fill)
      seen = np.pad(np.concatenate([np.asarray(mask), drawn[:, :start]], 1), fill)
      number = (step * blocks + block) % 2**31  # so that blocks draw different noise
      rows = to_host(draw(params, text, seen, prompt_ids, seed=seed, step=number))
      best = np.asarray(score(rows)).reshape(prompts, candidates).argmax(axis=1)
      chosen = jax.tree.map(lambda x, best=best: x[np.arange(prompts) * candidates + best], rows)
      # Rows that have ended were drawn too, because shapes are fixed; their draws are dropped.
      new = slice(width + max_new_tokens - block_tokens, None)
      drawn[:, start:end] = chosen.mask[:, new] & ~finished[:, None]
      made[:, start:end] = np.where(drawn[:, start:end], chosen.tokens[:, new], pad_id)
      logp[:, start:end] = np.where(drawn[:, start:end], chosen.behavior_logp[:, new], 0)
      finished |= chosen.finished
      if finished.all():
        break
    return laid_out(tokens, mask, prompt_ids, made, logp, drawn, finished, pad_id=pad_id)

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
      unembedding(policy, params),
      stats={'value': logit_stats.token_logit},
    )
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), mask.shape)
    last = jnp.max(jnp.where(mask, places, 0), axis=1, keepdims=True)
    return jnp.take_along_axis(stats['value'], last, axis=1)[:, 0]

  value = jit(value)
  return lambda batch: value(params, batch.tokens, batch.segment_ids, batch.mask)


def block_streamer(
  policy: Policy,
  params: Params,
  *,
  scorer: tuple[Policy, Params],
  candidates: int,
  block_tokens: int,
  stop_ids: Sequence[int] = (),
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Callable[..., Iterator[int]]:
  """Makes `stream(prompt, *, max_new_tokens, seed, turn)`, which yields one completion's tokens.

  The function is called as a `Streamer` is, but the first token comes when the last block is chosen.
  Where the model can read no further whole block, the completion ends.

  Args:
    policy, params: the model that blocks are drawn from.
    scorer: the model whose `prefix_value` chooses, and its parameters.
    candidates, block_tokens: see `make_block_sampler`.
    stop_ids, temperature, top_k, top_p: see `make_sampler`; a temperature of 0 is greedy.

  Raises:
    ValueError: a number below 1, a setting that `make_sampler` refuses, or (from `stream`) a prompt that
      leaves no room for a block.
  """
  if candidates < 1 or block_tokens < 1:
    raise ValueError(
      f'candidates and block_tokens must be at least 1, got {candidates} and {block_tokens}'
    )
  behavior_policy, temperature = behavior_at(temperature)
  value = prefix_value(*scorer)

  @functools.cache
  def sampler(max_new_tokens: int) -> Callable[..., Batch]:
    return make_block_sampler(
      {'policy': policy},
      score=value,
      candidates=candidates,
      block_tokens=block_tokens,
      max_new_tokens=max_new_tokens,
      behavior_policy=behavior_policy,
      stop_ids=stop_ids,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )

  def stream(prompt: Sequence[int], *, max_new_tokens: int, seed: int, turn: int) -> Iterator[int]:
    limit = min(policy.config.max_length, scorer[0].config.max_length)
    room = limit - len(prompt)
    blocks = min(-(-max_new_tokens // block_tokens), room // block_tokens)
    if blocks < 1:
      raise ValueError(
        f'a prompt of {len(prompt)} tokens leaves room for {max(room, 0)} more, less than a block of '
        f'{block_tokens}'
      )
    # The prompt is left-padded to a multiple of WIDTH, as far as the models have room for it.
    width = min(len(prompt) - len(prompt) % -WIDTH, limit - blocks * block_tokens)
    tokens = np.zeros((1, width), np.int32)
    tokens[0, width - len(prompt) :] = prompt
    mask = np.arange(width)[None] >= width - len(prompt)
    ids = np.array([turn], np.int32)
    rows = sampler(blocks * block_tokens)(
      {'policy': params}, tokens, mask, ids, seed=seed, step=turn
    )
    yield from rows.tokens[rows.mask][:max_new_tokens].tolist()

  return stream
