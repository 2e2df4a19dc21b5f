"""V_0: the model of prompts in context, embeddings of prompts, and budgets that it proposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import curricula, models
from polgrad.curricula import embeddings, in_context
from polgrad.curricula.base import Request
from polgrad.data import batching, tokenizers
from tests import hub

RNG = np.random.default_rng(0)
WIDTH = 6


def unit(*shape):
  rows = RNG.normal(size=shape).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def transcribed(params, query, embeddings, rewards):
  """The logit of one query in float64, with loops."""
  params = {name: np.asarray(x, np.float64) for name, x in params.items()}
  number, total = len(rewards), sum(rewards)
  logit = params['base'] * np.log((total + 0.5) / (number - total + 0.5)) + params['offset']
  logit += params['bias'] @ query
  for h, trust in enumerate(params['trust']):
    project = lambda x, h=h: params['compare'][:, h].T @ x
    alike = [np.exp(params['sharpness'][h]) * project(query) @ project(x) for x in embeddings]
    weights = np.exp(alike) / np.sum(np.exp(alike))
    logit += trust * sum(w * (r - total / number) for w, r in zip(weights, rewards))
  return logit


def some_params():
  params = in_context.init(jax.random.key(1), WIDTH, 3)
  return jax.tree.map(lambda x: x + RNG.normal(size=x.shape).astype(np.float32) / 3, params)


def test_scores_are_the_equation_and_look_at_what_is_seen_alone():
  params, query, found = some_params(), unit(3, WIDTH), unit(5, WIDTH)
  rewards = np.array([1, 0, 1, 1, 0], np.float32)
  seen = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
  score = lambda rewards: in_context.score(params, query, found, rewards, seen)
  got = score(rewards)
  for q in (0, 1):
    want = transcribed(params, query[q], found[seen[q]], rewards[seen[q]])
    np.testing.assert_allclose(got[q], want, rtol=1e-5)
  want = params['offset'] + query[2] @ params['bias']  # nothing is known of the policy
  np.testing.assert_allclose(got[2], want, rtol=1e-5)
  changed = score(np.where(seen[0], rewards, 1 - rewards))
  np.testing.assert_array_equal(got[0], changed[0])
  assert abs(got[1] - changed[1]) > 1e-3
  gradient = jax.grad(lambda p: in_context.score(p, query, found, rewards, seen).sum())(params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_the_memory_is_a_ring_of_the_last_valid_pairs():
  memory = in_context.empty(4, 1)
  add = lambda memory, rows, valid: in_context.stored(
    memory,
    np.asarray(rows, np.float32)[:, None],
    np.ones(len(rows), np.float32),
    jnp.asarray(rows, jnp.int32),
    np.asarray(valid, bool),
  )
  memory = add(memory, [5, 6, 7], [1, 0, 1])
  assert {*np.asarray(memory.rows).tolist()} == {5, 7, -1} and memory.count == 2
  memory = add(memory, [1, 2, 3], [1, 1, 1])
  assert {*np.asarray(memory.rows).tolist()} > {1, 2, 3} and memory.count == 5
  found, _, valid = in_context.newest(memory, 3)
  assert sorted(found[:, 0].tolist()) == [1, 2, 3] and valid.all()
  full = add(memory, range(10, 20), [1] * 10)  # more than fit
  assert len({*np.asarray(full.rows).tolist()}) == 4 and min(full.rows) >= 10
  assert in_context.newest(in_context.empty(4, 1), 3)[2].tolist() == [False] * 3


def test_it_learns_which_prompts_are_solved_and_follows_a_policy_that_changes():
  """Prompts on one side of a plane are solved. Prompts that were never tried are told apart, and also
  after one step of a policy that solves the others instead."""
  prompts, normal = unit(120, WIDTH), unit(WIDTH)
  solved = prompts @ normal > 0
  one = curricula.v0(
    embed=lambda records: np.stack([prompts[record['id']] for record in records]),
    context=64,
    memory=128,
  )
  records = [{'id': i} for i in range(len(prompts))]
  update = jax.jit(one.update)

  def after(state, solved):
    rows = np.repeat(RNG.choice(80, 16, replace=False), 4).astype(np.int32)
    rewards = solved[rows].astype(np.float32)
    every = np.ones(len(rows), bool)
    found = curricula.Observed(
      rows, rewards, every, {}, rows, rewards, every, embeddings=prompts[rows]
    )
    return update(state, found)

  def told(state, solved):
    """How many pairs of new prompts are in the right order."""
    p = np.asarray(in_context.predicted(state, prompts[80:], context=64))
    right = solved[80:]
    return np.mean(p[right][:, None] > p[~right][None])

  state = one.init(records)
  assert one.report(state) == {'loss': 0.0, 'ranking': 0.5}
  for _ in range(12):
    state = after(state, solved)
  assert told(state, solved) > 0.9 and one.report(state)['ranking'] > 0.9
  state = after(state, ~solved)
  assert told(state, ~solved) > 0.9 and one.report(state)['ranking'] < 0.1


def test_budgets_have_the_sum_and_the_bounds_and_prefer_contrast():
  solved = np.arange(40) % 2 == 0
  one = curricula.v0(
    embed=lambda records: np.eye(2, dtype=np.float32)[[int(solved[r['id']]) for r in records]],
    context=80,
    memory=80,
    updates=1,
    prompts=0.25,
    least=2,
    most=8,
  )
  records = [{'id': i} for i in range(40)]
  rows = np.arange(40, dtype=np.int32).repeat(2)
  rewards = np.where(solved[rows], 1.0, np.arange(80) % 4 == 2).astype(np.float32)
  every = np.ones(80, bool)
  found = curricula.Observed(
    rows,
    rewards,
    every,
    {},
    rows,
    rewards,
    every,
    embeddings=one.embed([records[i] for i in rows]),
  )
  state = jax.jit(one.update)(one.init(records), found)
  ask = Request(count=32, size=40, cursor=0, seed=0, records=records)
  drawn, times = np.unique(one.propose(state, ask), return_counts=True)
  assert len(drawn) == 8 and times.sum() == 32 and times.min() >= 2 and times.max() <= 8
  assert times[~solved[drawn]].min() > 2 and times[solved[drawn]].max() == 2
  # Groups of four: the numbers of completions are multiples of four, at least 2.
  asked = ask._replace(count=16, samples_per_prompt=4)
  _, times = np.unique(one.propose(state, asked), return_counts=True)
  assert times.sum() == 16 and times.max() <= 4
  assert len(one.propose(state, ask._replace(count=1))) == 1  # after a dropped record


def test_character_ngrams_tell_prompts_apart():
  embed = embeddings.character_ngrams(size=64)
  found = embed([{'prompt': '12+34='}, {'prompt': '34+12='}, {'prompt': '12+35='}, {'prompt': ''}])
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0], rtol=1e-6)
  alike = found @ found.T
  assert alike[0, 2] > alike[0, 1] and alike[0, 2] < 0.999
  chat = [{'role': 'user', 'content': '12+'}, {'role': 'user', 'content': '34='}]
  assert embed([{'messages': chat}]).shape == (1, 64)


def test_states_of_a_folder_are_pooled_over_the_tokens_of_each_prompt(tmp_path):
  folder = hub.small('qwen3', tmp_path)
  policy, tokenizer = models.pretrained(path=folder), tokenizers.huggingface(path=folder)
  params, look = policy.init(jax.random.key(0)), jax.jit(policy.hidden)
  records = [{'prompt': text} for text in ('a longer prompt', 'b', 'c ' * 20)]
  for pooling in ('mean', 'last'):
    found = embeddings.states(path=folder, pooling=pooling, batch=4)(records)
    for row, record in zip(found, records):
      laid = batching.prompts([record | {'id': 0}], tokenizer, length=64)
      [hidden] = np.asarray(look(params, laid.tokens, laid.mask.astype(np.int32)), np.float64)
      hidden = hidden[laid.mask[0]]
      want = hidden.mean(axis=0) if pooling == 'mean' else hidden[-1]
      np.testing.assert_allclose(row, want / np.linalg.norm(want), atol=1e-5)
  with pytest.raises(FileNotFoundError, match='nowhere'):
    embeddings.states(path=str(tmp_path / 'nowhere'))


def test_routing_prefers_what_is_right_and_cheap():
  rewards, costs = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 1.0], [4.0, 4.0]])
  for beta, want in ((1.0, [0, 1]), (0.5, [0, 1]), (0.0, [0, 0]), (0.3, [0, 0])):
    labels = curricula.routing_label(rewards, costs, beta=beta)
    assert curricula.routed(labels).tolist() == want
  for wrong in (dict(beta=1.5), dict(beta=0.5, costs=-costs)):
    with pytest.raises(ValueError, match='must be in'):
      curricula.routing_label(**{'rewards': rewards, 'costs': costs, **wrong})


def test_bounds_that_cross_are_refused():
  with pytest.raises(ValueError, match='least=9 is above most=8'):
    curricula.v0(least=9, most=8)
