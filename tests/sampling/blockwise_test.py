"""Block-wise decoding continues with the best candidate, and reduces to best-of-n."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.sampling import make_block_sampler, make_sampler, prefix_value
from polgrad.sampling.blockwise import block_streamer
from tests.models import tiny

POLICY, PARAMS = tiny.policy(num_layers=1), tiny.params(num_layers=1)
STOPS = (3, 5, 8)
WIDTH, NEW, CANDIDATES = 6, 6, 4
# Two prompts of 6 and 4 tokens: their blocks all have one padded width.
TOKENS, IDS = tiny.rows(0, 2, WIDTH), jnp.array([7, 3])
MASK = jnp.arange(WIDTH)[None] >= jnp.array([0, 2])[:, None]
SETTINGS = dict(max_new_tokens=NEW, stop_ids=STOPS, pad_id=1)


def token_sum(batch) -> np.ndarray:
  """A score that needs no model: the sum of the completion's ids."""
  return np.where(batch.mask, batch.tokens, 0).sum(axis=1)


@functools.cache
def decoded(block: int, candidates: int = CANDIDATES):
  seen = []

  def score(batch):
    seen.append(batch)
    return token_sum(batch)

  sample = make_block_sampler(
    {'policy': POLICY}, score=score, candidates=candidates, block_tokens=block, **SETTINGS
  )
  return sample({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0), seen


def test_one_block_is_best_of_n():
  found, _ = decoded(NEW)
  draw = make_sampler({'policy': POLICY}, samples_per_prompt=CANDIDATES, **SETTINGS)
  rows = draw({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
  scores = token_sum(jax.tree.map(np.asarray, rows)).reshape(-1, CANDIDATES)
  best = np.arange(len(scores)) * CANDIDATES + scores.argmax(axis=1)
  for field in ('tokens', 'mask', 'segment_ids', 'finished', 'behavior_logp'):
    np.testing.assert_array_equal(getattr(found, field), np.asarray(getattr(rows, field))[best])


def test_each_block_continues_the_best_candidate():
  found, seen = decoded(3)
  assert len(seen) == 2 and found.tokens.shape == (2, WIDTH + NEW)
  before = np.zeros((2, 0), int)
  ended = np.zeros(2, bool)
  for block, rows in enumerate(seen):
    new = rows.tokens[:, -3:].reshape(2, CANDIDATES, 3)
    drawn = rows.mask[:, -3:].reshape(2, CANDIDATES, 3)
    scores = np.where(drawn, new, 0).sum(axis=2)
    best = new[np.arange(2), scores.argmax(axis=1)]
    made = found.tokens[:, WIDTH + 3 * block : WIDTH + 3 * block + 3]
    mask = found.mask[:, WIDTH + 3 * block : WIDTH + 3 * block + 3]
    np.testing.assert_array_equal(np.where(mask, made, 0), np.where(mask, best, 0))
    # A candidate continues its prompt and the blocks before it.
    for row in np.flatnonzero(~ended):
      prompt = np.asarray(TOKENS)[row][np.asarray(MASK)[row]]
      given = rows.tokens[row * CANDIDATES][rows.segment_ids[row * CANDIDATES] > 0]
      text = np.concatenate([prompt, before[row]])
      np.testing.assert_array_equal(given[: len(text)], text)
    before = np.concatenate([before, made], axis=1)
    ended |= np.isin(np.where(mask, made, -1), STOPS).any(axis=1)
  np.testing.assert_array_equal(found.finished, ended)
  # Nothing follows a stop token.
  lengths = found.mask.sum(axis=1)
  for row, length in enumerate(lengths):
    assert found.mask[row, WIDTH : WIDTH + length].all()
    assert not np.isin(found.tokens[row, WIDTH : WIDTH + length - 1], STOPS).any()


def test_the_scorer_values_the_last_token_of_a_row():
  scorer = tiny.params(1, num_layers=1)
  _, seen = decoded(3)
  value = np.asarray(prefix_value(POLICY, scorer)(seen[0]))
  row = 2
  length = seen[0].segment_ids[row] > 0
  tokens = jnp.asarray(seen[0].tokens[row][length])[None]
  forward = lambda p: POLICY.unembed(p, POLICY.hidden(p, tokens, jnp.ones_like(tokens)))
  logits = jax.jit(forward)(scorer)
  assert value[row] == pytest.approx(float(logits[0, -2, tokens[0, -1]]), abs=1e-4)


def test_blocks_must_fill_the_completion():
  with pytest.raises(ValueError, match='block_tokens must divide max_new_tokens 6, got 4'):
    make_block_sampler({}, score=token_sum, candidates=2, block_tokens=4, max_new_tokens=6)


def test_streamed_blocks_are_those_of_the_block_sampler():
  scorer = (POLICY, tiny.params(1, num_layers=1))
  common = dict(candidates=3, block_tokens=2, stop_ids=STOPS)
  stream = block_streamer(POLICY, PARAMS, scorer=scorer, **common)
  prompt = np.asarray(TOKENS[0]).tolist()
  found = list(stream(prompt, max_new_tokens=5, seed=2, turn=7))
  # The same prompt in as many columns: the draws depend neither on the padding nor on the last block.
  draw = make_block_sampler(
    {'policy': POLICY}, score=prefix_value(*scorer), max_new_tokens=6, **common
  )
  row = (TOKENS[:1], MASK[:1], jnp.array([7]))
  rows = draw({'policy': PARAMS}, *row, seed=2, step=7)
  assert found == rows.tokens[rows.mask][:5].tolist()


def test_a_prompt_without_room_for_a_block_is_refused():
  stream = block_streamer(POLICY, PARAMS, scorer=(POLICY, PARAMS), candidates=2, block_tokens=8)
  limit = POLICY.config.max_length
  with pytest.raises(ValueError, match='room for 3 more, less than a block of 8'):
    list(stream([5] * (limit - 3), max_new_tokens=8, seed=0, turn=0))
