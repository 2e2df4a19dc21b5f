"""Rows of several turns equal one forward pass over them, whenever their replies come."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import exchanges, sharding
from polgrad.sampling import (
  behavior_policies,
  decoding,
  make_sampler,
  make_turn_sampler,
  processors,
  turns,
)
from polgrad.sampling.stopping import StopTable
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


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
  """The caches of these short rows have several spans, too."""
  monkeypatch.setattr(decoding, 'SMALL', 1)


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


READ = []  # tokens that the model of `sampler` has read, and places of each pass


@functools.cache
def sampler():
  note = lambda valid, size: READ.append((int(valid), int(size)))

  def decode(params, tokens, positions, valid, *rest):
    jax.debug.callback(note, jnp.sum(valid), tokens.shape[1])
    return POLICY.decode(params, tokens, positions, valid, *rest)

  return make_turn_sampler({'policy': POLICY._replace(decode=decode)}, **SETTINGS)


def rollout(replies, sample=None, params=None) -> Batch:
  sample, params = sample or sampler(), params or {'policy': PARAMS}
  return jax.tree.map(
    np.asarray, sample(params, TOKENS, MASK, IDS, seed=0, step=0, replies=replies)
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
  jax.effects_barrier()
  READ.clear()
  out = rollout(script)
  assert_scored(out)
  assert_told(out, script)
  # Every token is read once: those of a prompt for all of its rows, and of a turn only what is new.
  jax.effects_barrier()
  read = lambda size: sum(valid for valid, places in READ if places == size)
  given = (out.segment_ids[:, WIDTH:] > 0) & ~out.mask[:, WIDTH:]
  assert read(WIDTH) == MASK.sum() and read(turns.CHUNK) == given.sum() > 100
  assert read(1) == out.mask.sum()


def assert_scored(out: Batch, policy=POLICY, process=lambda logits: logits):
  """The log-probs are those of one forward pass over the finished rows."""
  logits = policy.unembed(PARAMS, policy.hidden(PARAMS, out.tokens, out.segment_ids))
  logp = jax.nn.log_softmax(process(logits[:, :-1] / SETTINGS['temperature']))
  logp = jnp.take_along_axis(logp, out.tokens[:, 1:, None], axis=-1)[..., 0]
  logp = np.pad(logp, ((0, 0), (1, 0)))
  np.testing.assert_allclose(out.behavior_logp, np.where(out.mask, logp, 0), atol=1e-5)


def assert_told(out: Batch, script: Script, stops=lambda ids: ids[-1] in STOPS):
  """The rows hold what the policy has said and read, one after the other."""
  assert len(script.asked) == len(out.tokens)
  for row, heard in script.asked.items():
    said, drawn = [], []
    for number, (ids, ended) in enumerate(heard, start=1):
      said, drawn = said + ids, drawn + [True] * len(ids)
      assert ended == stops(ids) and not any(stops(ids[:n]) for n in range(1, len(ids)))
      reply = script.reply(row, number)
      fits = reply is not None and len(said) + len(reply) < NEW
      assert fits == (number < len(heard))
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
  jax.tree.map(np.testing.assert_array_equal, rollout(Script(4, order=order)), rollout(Script(4)))


# A turn ends with a stop token, with a token twice, or after six tokens.
TWICE = 22
FOLLOWING = np.zeros((3, tiny.VOCAB), np.uint8)
FOLLOWING[0, TWICE], FOLLOWING[1, TWICE], FOLLOWING[2] = 1, 2, 2
MANY = dict(
  turn_tokens=6, stop_table=StopTable(FOLLOWING, start=0, end=2), top_k=9, slots=5,
  default=tiny.policy(window=5, local_layers=(0,)), behavior_policy=behavior_policies.geometric_mixture,
)  # fmt: skip


def test_slots_stop_strings_budgets_and_a_mixture_of_models_with_local_layers():
  sets = {'policy': PARAMS, 'reference': tiny.params(1)}
  sample = make_turn_sampler({}, **SETTINGS, **MANY)
  script = Script(4, 9)
  out = rollout(script, sample, params=sets)
  stops = lambda ids: ids[-1] in STOPS or ids[-2:] == [TWICE, TWICE]
  assert_told(out, script, stops)
  said = [turn for row in script.asked.values() for turn in row]
  assert max(len(ids) for ids, _ in said) == 6
  assert any(ended and ids[-1] == TWICE for ids, ended in said)
  # A turn that ends with the first half of the string does not make the next one shorter.
  pairs = [
    (a[-1], b[0]) for row in script.asked.values() for (a, _), (b, _) in itertools.pairwise(row)
  ]
  assert (TWICE, TWICE) in pairs
  policy = MANY['default']
  other = policy.unembed(
    sets['reference'], policy.hidden(sets['reference'], out.tokens, out.segment_ids)
  )
  mixed = lambda logits: processors.top_k((logits + other[:, :-1] / 0.7) / 2, k=9)
  assert_scored(out, policy, mixed)
  # The order of replies decides which slot a row gets, and changes nothing.
  late = rollout(Script(4, 9, 'late'), sample, params=sets)
  np.testing.assert_array_equal(late.tokens, out.tokens)
  np.testing.assert_allclose(late.behavior_logp, out.behavior_logp, atol=1e-5)


def test_a_mesh_of_eight_devices_gives_the_rows_of_one():
  mesh = sharding.make_mesh(data=2, context=2, tensor=2)
  policy = jax.tree.map(np.asarray, PARAMS)
  shardings = sharding.param_shardings(mesh, POLICY.axes(policy), policy)
  params = {'policy': sharding.place(policy, shardings)}
  sample = make_turn_sampler({'policy': POLICY}, mesh=mesh, **{**SETTINGS, 'slots': 8})
  prompts = [np.asarray(x) for x in (TOKENS, MASK, IDS)]
  script = Script(4, order='last')
  out = sharding.to_host(sample(params, *prompts, seed=0, step=0, replies=script))
  expected = rollout(Script(4))
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  np.testing.assert_array_equal(out.segment_ids, expected.segment_ids)
  np.testing.assert_allclose(out.behavior_logp, expected.behavior_logp, atol=1e-5)


def test_other_processes_follow_the_first_one(monkeypatch):
  """The second process is played: it gets what the first one broadcasts, and no replies."""
  sent = []
  told = lambda make, what: sent.append(make()) or sent[-1]
  monkeypatch.setattr(exchanges, 'first', told)
  first = rollout(Script(4, order='last'))
  monkeypatch.setattr(exchanges, 'first', lambda make, what: sent.pop(0))
  second = rollout(None)
  jax.tree.map(np.testing.assert_array_equal, second, first)
  assert not sent


@pytest.mark.parametrize(
  'reply, message',
  [
    ([], 'the reply to row 0 has no tokens; one that ends the row is None'),
    ([2, tiny.VOCAB], 'the reply to row 0 has tokens outside of the vocabulary of 23: 2 to 23'),
  ],
)
def test_replies_that_cannot_be_read_are_refused(reply, message):
  class Wrong(Script):
    def take(self, wait):
      return [(0, reply)] if 0 in self.open else super().take(wait)

  with pytest.raises(ValueError, match=message):
    rollout(Wrong(4))


def test_a_reply_that_nobody_waits_for_is_refused():
  class Twice(Script):
    def take(self, wait):
      return super().take(wait) * 2

  with pytest.raises(ValueError, match=r'a reply to row \d+, which waits for none'):
    rollout(Twice(4))


def test_a_negative_budget_is_refused():
  with pytest.raises(ValueError, match='turn_tokens must be 0'):
    make_turn_sampler({'policy': POLICY}, turn_tokens=-1, **SETTINGS)


def test_hot_tokens_are_drawn_from_the_distribution_that_is_reported():
  """Uncertain tokens have another temperature, in rows of one turn and of several ones."""
  heated = functools.partial(processors.entropy_scaled, strength=0.5)
  levels = np.array([0.5, 0.4, 3.0], np.float32)
  params = {'policy': PARAMS, 'entropy_levels': levels}
  sample = make_turn_sampler({'policy': POLICY}, **SETTINGS, token_temperature=heated)
  out = rollout(Script(2), sample, params)
  full = POLICY.unembed(PARAMS, POLICY.hidden(PARAMS, out.tokens, out.segment_ids))
  full = np.pad(np.asarray(full, np.float64)[:, :-1], ((0, 0), (1, 0), (0, 0))) / 0.7
  logp = lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
  entropy = -np.sum(np.exp(logp(full)) * logp(full), axis=-1)
  gap = np.log(entropy) - 0.5
  h = np.clip(np.where(gap > 0, gap / 0.4, gap / 3.0), -1, 1)
  assert h[out.mask].min() < -0.02 and h[out.mask].max() > 0.5
  of_tokens = lambda x: np.take_along_axis(logp(x), out.tokens[..., None], axis=-1)[..., 0]
  hot = of_tokens(full / (1 + 0.5 * h)[..., None])
  np.testing.assert_allclose(out.behavior_logp[out.mask], hot[out.mask], atol=1e-5)
  assert np.abs(of_tokens(full) - hot)[out.mask].max() > 1e-2
  # The same row is drawn by the sampler of one turn; with zeros it is that of a single temperature.
  one = make_sampler({'policy': POLICY}, **SETTINGS, token_temperature=heated)
  one = functools.partial(one, tokens=TOKENS, mask=MASK, prompt_ids=IDS, seed=0, step=0)
  single, many = one(params), rollout(Script(1), sample, params)
  np.testing.assert_array_equal(single.tokens, many.tokens)
  np.testing.assert_allclose(single.behavior_logp, many.behavior_logp, atol=1e-5)
  plain = rollout(Script(1))
  cold = one({'policy': PARAMS, 'entropy_levels': np.zeros(3, np.float32)})
  np.testing.assert_array_equal(cold.tokens, plain.tokens)
  np.testing.assert_allclose(cold.behavior_logp, plain.behavior_logp, atol=1e-5)
