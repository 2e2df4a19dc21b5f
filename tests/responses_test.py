"""The stored response of every data row, how far the policy has moved on it, and what SPO does then."""

import functools

import jax
import numpy as np
import pytest

from polgrad import build, collect, credit, curricula, learner, methods, phases, speed
from polgrad.collect import responses
from polgrad.credit import of_term
from polgrad.curricula import trackers
from polgrad.losses import baselines
from polgrad.types import Batch
from tests.runs import addition, method_of


def random_batch(rng, rows, length, prompts, vocabulary, start=2):
  """Rows of random tokens: `start` of the prompt, then a response of random length."""
  stop = rng.integers(start + 1, length + 1, rows)[:, None]
  position = np.arange(length)[None]
  return Batch(
    tokens=rng.integers(0, vocabulary, (rows, length)).astype(np.int32),
    segment_ids=(position < stop).astype(np.int32),
    mask=(position >= start) & (position < stop),
    prompt_ids=np.asarray(prompts, np.int32),
  )


def test_the_store_holds_the_last_response_of_every_prompt():
  """Against a dictionary, over random steps; the last of several rows of a prompt is kept."""
  rng, known = np.random.default_rng(0), {}
  store = responses.empty(7, 6)
  for step in range(12):
    batch = random_batch(rng, 4, 6, rng.integers(0, 7, 4), 50)
    if step % 3 == 2:
      batch.mask[1] = False  # the verifier failed: nothing of it is stored
    now, then = rng.normal(size=(2, 4, 6)).astype(np.float32)
    again = responses.recalled(store, batch)
    moved = responses.drift(store, batch.prompt_ids, now)
    before = jax.tree.map(np.copy, store)
    store = responses.stored(store, batch, then)
    for i, prompt in enumerate(batch.prompt_ids.tolist()):
      tokens, mask, logp = known.get(prompt, (batch.tokens[i], batch.mask[i], now[i]))
      np.testing.assert_array_equal(again.tokens[i], tokens)
      gaps = [abs(float(now[i, t]) - float(logp[t])) for t in np.flatnonzero(mask)]
      assert moved[i] == pytest.approx(np.mean(gaps) if gaps else 0, rel=1e-5)
    for i, prompt in enumerate(batch.prompt_ids.tolist()):
      if batch.mask[i].any():
        known[prompt] = batch.tokens[i], batch.mask[i], then[i]
    for prompt in range(7):
      assert store.mask[prompt].any() == (prompt in known)
    untouched = [prompt for prompt in range(7) if prompt not in batch.prompt_ids]
    for kept, old in zip(store, before):
      np.testing.assert_array_equal(kept[untouched], old[untouched])
  assert len(known) == 7


def test_an_empty_step_changes_nothing_and_the_order_of_prompts_does_not_matter():
  rng = np.random.default_rng(1)
  batch = random_batch(rng, 4, 6, [3, 0, 5, 2], 50)
  logp = rng.normal(size=(4, 6)).astype(np.float32)
  store = responses.stored(responses.empty(7, 6), batch, logp)
  order = np.array([2, 0, 3, 1])
  turned = responses.stored(
    responses.empty(7, 6), jax.tree.map(lambda x: x[order], batch), logp[order]
  )
  none = jax.tree.map(lambda x: x[:0], batch)
  empty_step = responses.stored(jax.tree.map(np.copy, store), none, logp[:0])
  for one in (turned, empty_step):
    jax.tree.map(np.testing.assert_array_equal, one, store)


def test_answers_of_the_data_are_no_responses():
  """Groups of two samples, and an answer that may be that of another prompt; written in place."""
  rng = np.random.default_rng(4)
  batch = random_batch(rng, 6, 6, [3, 3, 3, 1, 1, 1], 50).replace(
    stream=np.array([1, 1, 0, 1, 1, 0], np.int32), advantages=np.ones((6, 6), np.float32)
  )
  store, logp = responses.empty(5, 6), rng.normal(size=(6, 6)).astype(np.float32)
  assert responses.stored(store, batch, logp).tokens is store.tokens
  np.testing.assert_array_equal(store.tokens[[3, 1]], batch.tokens[[1, 4]])
  assert not store.mask[[0, 2, 4]].any()
  found = curricula.observed(batch, None)
  np.testing.assert_array_equal(found.trained_valid, [True, True, False] * 2)
  away = batch.replace(stream=None).with_arrays(opponent=np.array([0, 0, 1, 0, 0, 1], np.float32))
  np.testing.assert_array_equal(curricula.observed(away, None).trained_valid, found.trained_valid)
  # What cannot be written to, such as an array that a device gave, is copied.
  for x in store:
    x.flags.writeable = False
  again = responses.stored(store, batch, logp + 1)
  assert again.logp is not store.logp and again.logp[3].sum() > store.logp[3].sum()


def test_a_step_compares_the_policies_after_the_updates_of_the_two_visits():
  """Two steps of the phase with policies that differ much; log-probs and counts in float64."""
  run = build.build(addition(method_of('spo_single_stream')))
  phase = run.phases['train']
  rows, length = phase.collect.rows, phase.collect.length
  rng, vocabulary = np.random.default_rng(2), run.tokenizer.vocab_size
  first = np.arange(rows) + 5
  second = np.where(np.arange(rows) < rows // 2, first, first + 100)  # half of them come again
  start = phase.collect.prompt_length
  draw = lambda ids: random_batch(rng, rows, length, ids, vocabulary, start)
  batches = [draw(first), draw(second)]
  rewards = rng.integers(0, 2, (2, rows)).astype(np.float32)
  alpha = np.full(len(phase.source), 0.5)
  beta, store, last = alpha.copy(), {}, None
  forward = jax.jit(functools.partial(learner.forward, run.policy))
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    doing = phases.start_phase(run, state, phases.Logs())
    for batch, hits, ids in zip(batches, rewards, (first, second)):
      state = state.replace(params=jax.tree.map(lambda x: 1.2 * x, state.params))  # the updates
      every = np.ones(rows, bool)
      sampled = curricula.Sampled(ids.astype(np.int32), hits, every, {}, ~every)
      got = collect.Collected(batch, (), (), {}, [], [], sampled=sampled)
      state = doing.advance(state, got, doing.draw(state))
      logp = lambda b, params=state.params: np.asarray(forward(params, b).logp, np.float64)
      now, old = logp(batch), None if last is None else logp(last)
      for i, prompt in enumerate(ids.tolist()):
        drift = 0.0
        if prompt in store:
          j, then = store[prompt]
          drift = np.mean(np.abs(then - old[j])[last.mask[j]])
          assert drift > 1e-3
        rho = min(max(2 ** (-drift / 0.06), 0.875), 0.96)
        alpha[prompt] = rho * alpha[prompt] + hits[i]
        beta[prompt] = rho * beta[prompt] + 1 - hits[i]
      store = {prompt: (i, now[i]) for i, prompt in enumerate(ids.tolist())}
      last = batch
  np.testing.assert_allclose(state.curriculum_state.alpha, alpha, rtol=1e-4)
  np.testing.assert_allclose(state.curriculum_state.beta, beta, rtol=1e-4)
  # The second step has two forward passes: over what was stored, half of which is new, and the batch.
  mixed = batches[1].replace(
    segment_ids=np.where(np.arange(rows)[:, None] < rows // 2, *(b.segment_ids for b in batches)),
    mask=np.where(np.arange(rows)[:, None] < rows // 2, *(b.mask for b in batches)),
  )
  passes = [speed.forward_flops(run.model.config, b) for b in (mixed, batches[1])]
  assert got.metrics['flops/drift'] == sum(passes) and got.metrics['seconds/drift'] > 0
  assert got.metrics['drift'] > 0 and alpha[first].min() > 0.875 * 0.5
  np.testing.assert_array_equal(state.responses.tokens[second], batches[1].tokens)
  assert isinstance(state.responses.logp, np.ndarray)  # on the host


def test_the_weight_of_earlier_counts_follows_the_drift():
  drift = np.array([0, 0.0035, 0.0058, 0.0116, 0.03])
  want = np.clip(2 ** (-drift / 0.06), 0.875, 0.96)
  np.testing.assert_allclose(trackers.forgetting(drift), want, rtol=1e-6)
  np.testing.assert_allclose(want[[0, 4]], [0.96, 0.875])
  # From (4, 4), a success: without drift and with a large one, and of two rows of a prompt.
  one = curricula.spo(slow_decay=0.96)
  counts = trackers.DiscountedBeta(np.full(4, 4.0, np.float32), np.full(4, 4.0, np.float32))
  ids, ones = np.array([0, 1, 2, 2], np.int32), np.ones(4, np.float32)
  found = curricula.Observed(
    ids, ones, ones > 0, {}, ids, ones, ones > 0, np.array([0, 0.03, 0.0058, 0.0058], np.float32)
  )
  after = one.update(counts, found)
  middle = 2 ** (-0.0058 / 0.06)
  np.testing.assert_allclose(after.alpha, [4.84, 4.5, 4 * middle + 2, 4], rtol=1e-5)
  np.testing.assert_allclose(after.beta, [3.84, 3.5, 4 * middle, 4], rtol=1e-5)
  np.testing.assert_allclose(trackers.value(after)[:2], [0.5576, 0.5625], atol=1e-4)
  with pytest.raises(ValueError, match=r'slow_decay=0.5 is below decay=0.875'):
    curricula.spo(slow_decay=0.5)


def test_the_rate_of_a_term_and_the_advantage_are_of_the_same_number():
  """A reward of 3 exact - 0.2 long: both are of `exact`; without a term, of the reward cut to [0, 1]."""
  exact, long = np.array([1.0, 0, 1, 0]), np.array([1.0, 0, 0, 1])
  tracked = np.array([0.5, 0.25, 0.75, 0.5], np.float32)
  rewards = np.asarray(3 * exact - 0.2 * long, np.float32)
  batch = Batch(
    tokens=np.zeros((4, 2), np.int32),
    segment_ids=np.ones((4, 2), np.int32),
    mask=np.ones((4, 2), bool),
    rewards=rewards,
    valid=np.ones(4, bool),
    group_ids=np.arange(4),
  ).with_arrays(tracked_value=tracked, exact_term=exact.astype(np.float32))
  inner = credit.outcome(advantage=baselines.tracked_baseline)
  for term, number in (('exact', exact), ('', np.clip(rewards, 0, 1))):
    got, _ = credit.assign(of_term(credit=inner, term=term), batch, ())
    a = np.asarray(number, np.float64) - tracked
    want = (a - a.mean()) / (a.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(got.advantages[:, 0], want, rtol=1e-5)
  # The method asks for both, and a term that is none is refused.
  method = methods.spo_single_stream(term='exact')
  assert method.credit.term == method.curriculum.term == 'exact'
  assert build.build(addition(method)).phases['train'].collect.terms == ('exact',)
  with pytest.raises(ValueError, match="'exakt' is no term of the reward; did you mean 'exact'"):
    build.build(addition(methods.spo_single_stream(term='exakt')))
  with pytest.raises(ValueError, match='low must be below high'):
    of_term(credit=inner, low=1.0)
