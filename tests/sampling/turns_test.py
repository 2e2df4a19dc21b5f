"""Rows of several turns equal one forward pass over them, whenever their replies come."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.sampling import make_sampler, make_turn_sampler
from polgrad.types import Batch
from tests.models import tiny

POLICY, PARAMS = tiny.policy(), tiny.params()
STOPS = (3, 5, 8)
WIDTH, NEW, GROUP = 6, 44, 3
# Four prompts of 6, 4, 1 and 5 tokens.
TOKENS = tiny.rows(0, 4, WIDTH)
MASK = jnp.arange(WIDTH)[None] >= jnp.array([0, 2, 5, 1])[:, None]
IDS = jnp.array([7, 3, 11, 4])
SETTINGS = dict(
  max_new_tokens=NEW, samples_per_prompt=GROUP, stop_ids=STOPS, pad_id=1, temperature=0.7
)  # fmt: skip


class Script:
  """Replies of tokens that are known from the row and the number of its turn.

  Args:
    turns: turns of a row.
    longest: tokens of the longest reply.
    order: 'first' answers in the order of asking, 'last' the other way around, both one at a time;
      'late' has nothing unless it is waited for, and then all; 'all' has all at once.
  """

  def __init__(self, turns: int, longest: int = 20, order: str = 'all'):
    self.turns, self.longest, self.order = turns, longest, order
    self.asked: dict[int, list] = {}
    self.open: list[int] = []

  def ask(self, row, ids, ended):
    assert row not in self.open
    self.asked.setdefault(row, []).append((list(ids), ended))
    self.open.append(row)

  def reply(self, row, number):
    random = np.random.default_rng([row, number])
    if number == self.turns:
      return None
    return random.integers(0, tiny.VOCAB, random.integers(1, self.longest, endpoint=True)).tolist()

  def take(self, wait):
    assert self.open
    if self.order == 'late' and not wait:
      return []
    some = {'first': self.open[:1], 'last': self.open[-1:]}.get(self.order, self.open)
    self.open = [row for row in self.open if row not in some]
    return [(row, self.reply(row, len(self.asked[row]))) for row in some]


@functools.cache
def sampler(**settings):
  return make_turn_sampler({'policy': POLICY}, **{**SETTINGS, **settings})


def rollout(replies, sample=None, **settings) -> Batch:
  sample = sample or sampler(**settings)
  return jax.tree.map(
    np.asarray, sample({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0, replies=replies)
  )


def test_a_row_that_ends_at_once_is_that_of_one_turn():
  one = make_sampler({'policy': POLICY}, **SETTINGS)
  one = one({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
  many = rollout(Script(1))
  for name in ('tokens', 'segment_ids', 'mask', 'finished', 'prompt_ids', 'group_ids'):
    np.testing.assert_array_equal(getattr(many, name), getattr(one, name), err_msg=name)
  np.testing.assert_allclose(many.behavior_logp, one.behavior_logp, atol=1e-5)


def test_rows_of_several_turns_equal_one_forward_pass():
  script = Script(4)
  out = rollout(script)
  assert_scored(out)
  assert_told(out, script)


def assert_scored(out: Batch, policy=POLICY, temperature: float = 0.7):
  logits = policy.unembed(PARAMS, policy.hidden(PARAMS, out.tokens, out.segment_ids))
  logp = jax.nn.log_softmax(logits[:, :-1] / temperature)
  logp = jnp.take_along_axis(logp, out.tokens[:, 1:, None], axis=-1)[..., 0]
  logp = np.pad(logp, ((0, 0), (1, 0)))
  np.testing.assert_allclose(out.behavior_logp, np.where(out.mask, logp, 0), atol=1e-5)


def assert_told(out: Batch, script: Script, stops=lambda ids: ids[-1] in STOPS, columns=NEW):
  """The rows hold what the policy has said and read, one after the other."""
  assert len(script.asked) == len(out.tokens)
  for row, turns in script.asked.items():
    said, drawn = [], []
    for number, (ids, ended) in enumerate(turns, start=1):
      said, drawn = said + ids, drawn + [True] * len(ids)
      assert ended == stops(ids) and not set(ids[:-1]) & set(STOPS)
      reply = script.reply(row, number)
      fits = reply is not None and len(said) + len(reply) < columns
      assert fits == (number < len(turns))
      if fits:
        said, drawn = said + reply, drawn + [False] * len(reply)
    assert out.finished[row] == (reply is None and ended)
    made, rest = np.split(np.arange(WIDTH, out.tokens.shape[1]), [len(said)])
    assert out.tokens[row, made].tolist() == said
    assert out.mask[row, made].tolist() == drawn
    assert out.segment_ids[row, made].all() and not out.segment_ids[row, rest].any()
    assert set(out.tokens[row, rest].tolist()) <= {1}


@pytest.mark.parametrize('order', ['first', 'last', 'late'])
def test_a_batch_is_the_same_bit_by_bit_whenever_its_replies_come(order):
  expected = rollout(Script(4))
  jax.tree.map(np.testing.assert_array_equal, rollout(Script(4, order=order)), expected)
