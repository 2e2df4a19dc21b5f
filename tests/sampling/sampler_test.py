"""The sampler draws from the distribution that it reports, and the trainer sees the same one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad.sampling import behavior_policies, decoding, make_sampler, processors
from polgrad.types import Batch
from tests.models import tiny

POLICY, PARAMS, OTHER = tiny.policy(), tiny.params(), tiny.params(1)
STOPS = (3, 5, 8)
WIDTH, NEW, GROUP = 6, 7, 3
# Four prompts of 6, 4, 1 and 5 tokens.
TOKENS = tiny.rows(0, 4, WIDTH)
MASK = jnp.arange(WIDTH)[None] >= jnp.array([0, 2, 5, 1])[:, None]
IDS = jnp.array([7, 3, 11, 4])
SETTINGS = dict(
  max_new_tokens=NEW, samples_per_prompt=GROUP, stop_ids=STOPS, pad_id=1, temperature=0.7
)  # fmt: skip


@functools.cache
def sampler(**settings):
  return make_sampler({'policy': POLICY}, **{**SETTINGS, **settings})


@functools.cache
def rollout(seed: int = 0, step: int = 0, **settings) -> Batch:
  return sampler(**settings)({'policy': PARAMS}, TOKENS, MASK, IDS, seed=seed, step=step)


def logits(tokens, segment_ids, params=PARAMS):
  """[B, T, V]; entry t scores token t."""
  full = POLICY.unembed(params, POLICY.hidden(params, tokens, segment_ids))
  return jnp.pad(full[:, :-1], ((0, 0), (1, 0), (0, 0)))


def assert_equal(a: Batch, b: Batch, fields=('tokens', 'segment_ids', 'mask', 'finished')):
  for field in fields:
    np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
  np.testing.assert_allclose(a.behavior_logp, b.behavior_logp, rtol=2e-6, atol=2e-6)


def test_rows_are_prompt_major_and_begin_with_their_prompt():
  out = sampler()({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
  assert out.tokens.shape == (12, WIDTH + NEW)
  assert out.prompt_ids.tolist() == [7] * 3 + [3] * 3 + [11] * 3 + [4] * 3
  assert out.group_ids.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
  prompts, mask = np.repeat(TOKENS, GROUP, axis=0), np.repeat(MASK, GROUP, axis=0)
  np.testing.assert_array_equal(out.tokens[:, :WIDTH][mask], prompts[mask])
  np.testing.assert_array_equal(out.segment_ids[:, :WIDTH], mask)
  assert not out.mask[:, :WIDTH].any()


def test_and_08_sampler_log_probs_are_those_of_the_trainer():
  out = rollout()
  full = logits(out.tokens, out.segment_ids)
  for temperature, equal in ((0.7, True), (1.0, False)):
    log_probs = jax.nn.log_softmax(full / temperature)
    expected = jnp.take_along_axis(log_probs, out.tokens[..., None], axis=-1)[..., 0]
    gap = jnp.max(jnp.abs(jnp.where(out.mask, expected - out.behavior_logp, 0)))
    assert (gap < 1e-5) == equal
  np.testing.assert_array_equal(np.asarray(out.behavior_logp)[~np.asarray(out.mask)], 0)


def test_the_first_stop_token_counts_once_and_nothing_after_it():
  out = rollout()
  lengths = out.mask.sum(axis=1)
  assert 0 < int(jnp.sum(out.finished)) < len(lengths)  # both kinds of rows
  for row, length in enumerate(lengths.tolist()):
    made = out.tokens[row, WIDTH : WIDTH + length].tolist()
    assert not set(made[:-1]) & set(STOPS)
    assert bool(out.finished[row]) == (made[-1] in STOPS)
    assert length == NEW or out.finished[row]
    assert out.mask[row].tolist() == [False] * WIDTH + [True] * length + [False] * (NEW - length)
    assert set(out.tokens[row, WIDTH + length :].tolist()) <= {1}
    assert not out.segment_ids[row, WIDTH + length :].any()


def test_a_pad_id_that_is_a_stop_id_changes_nothing_real():
  a, b = rollout(), rollout(pad_id=STOPS[0])
  assert_equal(a, b, fields=('segment_ids', 'mask', 'finished'))
  real = np.asarray(a.segment_ids) > 0
  np.testing.assert_array_equal(a.tokens[real], b.tokens[real])
  assert set(np.asarray(b.tokens)[~real].tolist()) == {STOPS[0]}


def test_a_rollout_does_not_depend_on_how_the_batch_was_cut():
  whole = rollout()
  halves = [
    sampler()({'policy': PARAMS}, TOKENS[i], MASK[i], IDS[i], seed=0, step=0)
    for i in (slice(0, 2), slice(2, 4))
  ]
  assert_equal(whole, jax.tree.map(lambda *x: jnp.concatenate(x), *halves))


@pytest.mark.parametrize('slots', [1, 5, 100])
def test_slots_and_spans_change_no_completion(slots, monkeypatch):
  whole = rollout()
  monkeypatch.setattr(decoding, 'SMALL', 1 if slots == 5 else 128)
  assert_equal(whole, rollout(slots=slots))


def test_slots_of_a_mixture_of_models_with_local_layers():
  """Where rows have taken turns, the columns of a cache are no longer in order."""
  settings = dict(
    SETTINGS,
    behavior_policy=behavior_policies.geometric_mixture,
    default=tiny.policy(window=3, local_layers=(0,)),
    max_new_tokens=12,
  )
  params = {'policy': PARAMS, 'reference': OTHER}
  draw = lambda slots: make_sampler({}, slots=slots, **settings)(
    params, TOKENS, MASK, IDS, seed=0, step=0
  )
  assert_equal(draw(0), draw(4))


def test_a_slot_does_not_wait_for_the_longest_row():
  """Lengths are geometric with mean 8; a batch at a time waits for the longest of each."""

  def steps_of(rows, slots):
    steps = []

    def counted(params, hidden):
      jax.debug.callback(lambda: steps.append(1))
      return POLICY.unembed(params, hidden)

    ending = lambda policy: (
      jnp.full_like(policy, -10.0).at[:, 3].set(jnp.log(1 / 7)).at[:, 4].set(0.0)
    )
    sample = make_sampler(
      {'policy': POLICY._replace(unembed=counted)},
      behavior_policy=ending,
      slots=slots,
      samples_per_prompt=rows,
      max_new_tokens=57,
      stop_ids=(3,),
    )
    out = sample({'policy': PARAMS}, TOKENS[:1], MASK[:1], IDS[:1], seed=0, step=0)
    jax.effects_barrier()
    return len(steps), out.mask.sum(axis=1)

  taken, lengths = steps_of(64, 8)
  batches = sum(int(lengths[i : i + 8].max()) for i in range(0, 64, 8))
  assert lengths.sum() / 8 <= taken < 0.6 * batches


def test_padding_is_read_only_as_far_as_prompts_need_it():
  widths = []

  def decode(params, tokens, *rest):
    widths.append(tokens.shape[1])
    return POLICY.decode(params, tokens, *rest)

  sample = make_sampler({'policy': POLICY._replace(decode=decode)}, **SETTINGS)
  tokens = tiny.rows(2, 4, 16)
  for length in range(1, 17):
    mask = jnp.broadcast_to(jnp.arange(16) >= 16 - length, tokens.shape)
    sample({'policy': PARAMS}, tokens, mask, IDS, seed=0, step=length)
  assert [w for w in widths if w > 1] == [4, 8, 16]


def test_tokens_that_all_prompts_begin_with_are_read_once():
  read = []

  def decode(params, tokens, *rest):
    read.append(tokens.shape)
    return policy.decode(params, tokens, *rest)

  policy, params = tiny.policy(num_layers=1), tiny.params(num_layers=1)
  mask = np.arange(8)[None] >= np.array([0, 2, 1, 0])[:, None]
  tokens = np.array(tiny.rows(5, 4, 8))
  for row, start in zip(tokens, np.argmax(mask, axis=1)):
    row[start : start + 5] = [4, 9, 2, 6, 1]
  sample = make_sampler({'policy': policy._replace(decode=decode)}, max_new_tokens=2)
  out = sample({'policy': params}, tokens, mask, IDS, seed=0, step=0)
  assert read == [(1, 4), (4, 4), (4, 1)]  # in quarters of the width of eight
  logp = tiny.logp(policy, params, out.tokens, out.segment_ids)
  np.testing.assert_allclose(out.behavior_logp[out.mask], logp[out.mask], atol=1e-5)


def test_more_padding_changes_no_completion():
  pad = lambda x: jnp.pad(x, ((0, 0), (2, 0)))
  wide = sampler()({'policy': PARAMS}, pad(TOKENS), pad(MASK), IDS, seed=0, step=0)
  cut = wide.replace(
    **{k: getattr(wide, k)[:, 2:] for k in ('tokens', 'segment_ids', 'mask', 'behavior_logp')}
  )
  assert_equal(rollout(), cut)


def test_noise_depends_on_seed_step_prompt_and_sample():
  same = sampler()({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
  np.testing.assert_array_equal(rollout().tokens, same.tokens)
  made = lambda r: np.asarray(r.tokens)[:, WIDTH:]
  for other in (rollout(seed=1), rollout(step=1)):
    assert (made(rollout()) != made(other)).any(axis=1).mean() > 0.5
  tokens, mask = (x[:1].repeat(4, axis=0) for x in (TOKENS, MASK))
  one = sampler()({'policy': PARAMS}, tokens, mask, IDS, seed=0, step=0)
  assert len({tuple(row) for row in made(one).tolist()}) > 6  # one prompt text, twelve draws


def test_new_seeds_steps_and_parameters_do_not_retrace():
  traces = []

  def counted(policy):
    traces.append(1)
    return policy

  sample = make_sampler({'policy': POLICY}, behavior_policy=counted, **SETTINGS)
  sample({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
  first = len(traces)
  for step in (1, 2**31 - 1):
    sample({'policy': OTHER}, TOKENS, MASK, IDS, seed=9, step=step)
  assert first and len(traces) == first


def test_the_loop_ends_when_all_rows_have():
  steps = []

  def counted(params, hidden):
    jax.debug.callback(lambda: steps.append(1))
    return POLICY.unembed(params, hidden)

  policies = {'policy': POLICY._replace(unembed=counted)}
  sample = make_sampler(policies, max_new_tokens=50, stop_ids=tuple(range(tiny.VOCAB)))
  out = sample({'policy': PARAMS}, TOKENS, MASK, IDS, seed=0, step=0)
  jax.effects_barrier()
  assert len(steps) == 1 and out.mask.sum(axis=1).tolist() == [1] * 4


def test_draws_follow_the_reported_distribution():
  count = 4000
  sample = make_sampler(
    {'policy': POLICY}, max_new_tokens=1, samples_per_prompt=count, temperature=1.5
  )
  out = sample({'policy': PARAMS}, TOKENS[:1], MASK[:1], IDS[:1], seed=3, step=0)
  drawn = np.asarray(out.tokens)[:, WIDTH]
  probs = np.asarray(jax.nn.softmax(logits(out.tokens[:1], out.segment_ids[:1])[0, WIDTH] / 1.5))
  expected = count * probs
  chi_square = np.sum((np.bincount(drawn, minlength=tiny.VOCAB) - expected) ** 2 / expected)
  assert chi_square < 48.3  # 0.1% point for 22 degrees of freedom


def test_draws_from_a_large_vocabulary_have_its_probabilities():
  size, count = 300, 8000  # 10 groups of 32, the last places of which are no tokens
  logits = 2 * jax.random.normal(jax.random.key(0), (size,))
  log_probs = jax.nn.log_softmax(logits.at[::3].set(-jnp.inf))
  keys = jax.random.split(jax.random.key(1), count)
  noise = decoding.gumbel(keys, jnp.zeros(count, jnp.int32), size)
  assert noise.shape == (count, 42)
  drawn = decoding.drawn(jnp.broadcast_to(log_probs, (count, size)), noise)
  found, expected = np.bincount(drawn, minlength=size), count * np.exp(log_probs)
  assert not found[::3].any()
  possible = expected > 0
  chi_square = np.sum(((found - expected)[possible] ** 2) / expected[possible])
  assert chi_square < 266.4  # 0.1% point for 199 degrees of freedom
  alone = jnp.full((1, size), -jnp.inf).at[0, 299].set(0)
  assert decoding.drawn(alone, noise[:1])[0] == 299
  # Nothing is drawn from NaN, but it is a token that a tokenizer knows.
  assert 0 <= decoding.drawn(jnp.full((1, size), jnp.nan), noise[:1])[0] < size


def test_greedy_is_the_argmax_of_the_whole_forward_pass():
  out = rollout(behavior_policy=behavior_policies.greedy, samples_per_prompt=1)
  best = jnp.argmax(logits(out.tokens, out.segment_ids), axis=-1)
  np.testing.assert_array_equal(out.tokens[out.mask], best[out.mask])
  np.testing.assert_array_equal(out.behavior_logp, 0)  # probability one


def test_log_probs_are_those_of_the_kept_set():
  out = rollout(top_k=5, top_p=0.8)
  kept = processors.top_p(processors.top_k(logits(out.tokens, out.segment_ids) / 0.7, k=5), p=0.8)
  drawn = jnp.take_along_axis(kept, out.tokens[..., None], axis=-1)[..., 0]
  mask = np.asarray(out.mask)
  assert jnp.all(jnp.isfinite(drawn[mask]))  # nothing is drawn from outside the set
  exponentials = np.where(np.isfinite(kept), np.exp(kept), 0)
  expected = drawn - np.log(exponentials.sum(axis=-1))  # the set sums to one
  np.testing.assert_allclose(out.behavior_logp[mask], expected[mask], atol=1e-5)
  sizes = np.isfinite(kept).sum(axis=-1)[mask]
  assert sizes.max() <= 5 and sizes.min() < 5


def test_a_mixture_keeps_a_cache_for_each_parameter_set():
  sample = make_sampler(
    {},
    behavior_policy=functools.partial(behavior_policies.geometric_mixture, reference_weight=0.25),
    default=POLICY,
    **SETTINGS,
  )
  out = sample({'policy': PARAMS, 'reference': OTHER}, TOKENS, MASK, IDS, seed=0, step=0)
  a, b = (np.asarray(logits(out.tokens, out.segment_ids, p), np.float64) for p in (PARAMS, OTHER))
  mixed = (0.75 * a + 0.25 * b) / 0.7
  log_probs = mixed - np.log(np.exp(mixed).sum(axis=-1, keepdims=True))
  expected = np.take_along_axis(log_probs, np.asarray(out.tokens)[..., None], axis=-1)[..., 0]
  mask = np.asarray(out.mask)
  np.testing.assert_allclose(np.asarray(out.behavior_logp)[mask], expected[mask], atol=1e-5)


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(temperature=0.0), 'must be positive, got 0.0; use behavior_policies.greedy'),
    (dict(top_p=0.0), '0 < top_p <= 1'),
    (dict(top_k=-1), 'top_k >= 0'),
    (dict(max_new_tokens=0), 'at least 1'),
    (dict(slots=-1), 'slots must be 0 or a multiple of the data-parallel size 1, got -1'),
    (dict(behavior_policy=behavior_policies.geometric_mixture), r"reads \['reference'\]"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    make_sampler({'policy': POLICY}, **{**SETTINGS, **settings})


def test_models_with_different_vocabularies_are_refused():
  policies = {'policy': POLICY, 'reference': tiny.policy(vocab_size=9)}
  with pytest.raises(ValueError, match='vocabularies of the behavior policy differ'):
    make_sampler(policies, behavior_policy=behavior_policies.geometric_mixture, **SETTINGS)
