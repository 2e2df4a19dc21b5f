"""ELR+: what is mixed, the loss of mixed rows, and how two networks and their running means follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, learner, optim, phases
from polgrad.collect.mixed_targets import mixed
from polgrad.registry import part
from polgrad.types import Batch, MixedTokens
from tests.models import tiny
from tests.runs import addition, method_of

RNG = np.random.default_rng(5)
B, T, K, V = 3, 4, 2, 6
MASK = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]], bool)
TOKENS = RNG.integers(1, V, (B, T)).astype('i4')
EARLY = RNG.integers(0, V, (B, T, K)).astype('i4')
TARGETS = (0.4 * RNG.random((B, T, K))).astype('f4')
PARTNER, SHARE = np.array([2, 0, 1]), 0.75


def rows():
  seen = MASK.astype('i4')
  return Batch(tokens=TOKENS, segment_ids=seen, mask=MASK).with_arrays(
    early_tokens=EARLY.reshape(B, -1), early_targets=TARGETS.reshape(B, -1)
  )


def test_the_loss_of_mixed_rows_is_the_cross_entropy_with_both_and_the_mixed_targets():
  batch = mixed(rows(), PARTNER, SHARE)
  logits = RNG.normal(size=(B, T, V))
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  total = count = 0
  for i, j in enumerate(PARTNER):
    for t in range(T):
      if not (MASK[i, t] or MASK[j, t]):
        continue
      count += 1
      inner = 0
      for weight, row in ((SHARE, i), (1 - SHARE, j)):
        if MASK[row, t]:
          total -= weight * logp[i, t, TOKENS[row, t]]
          inner += weight * (TARGETS[row, t] * np.exp(logp[i, t, EARLY[row, t]])).sum()
      total += 3 * np.log(1 - inner)
  known = {n: batch[n] for n in ('tokens', 'mixed_tokens', 'mixed_weights')}
  known |= {n: batch[n] for n in ('early_tokens', 'early_targets')}
  own = np.take_along_axis(logp, TOKENS[..., None], -1)[..., 0]
  with jax.enable_x64(True):
    loss, _ = method_of('elr_plus').loss(mask=batch.mask, logits=logits, logp=own, **known)
  np.testing.assert_allclose(loss, total / count, rtol=1e-6)
  # With the whole weight on itself a row is that of `elr`.
  of = lambda name, batch, **more: method_of(name).loss(
    mask=batch.mask, logits=logits, logp=own, tokens=TOKENS, **more
  )[0]
  alone = mixed(rows(), np.arange(B), 1.0)
  known |= {n: alone[n] for n in known}
  del known['tokens']
  old = {n: rows()[n] for n in ('early_tokens', 'early_targets')}
  with jax.enable_x64(True):
    np.testing.assert_allclose(of('elr_plus', alone, **known), of('elr', rows(), **old), rtol=1e-6)


def test_the_model_reads_the_mean_of_two_embeddings():
  policy, params = tiny.policy(), tiny.params()
  a, b = tiny.rows(0, 2, 5), tiny.rows(1, 2, 5)
  seen = jnp.ones((2, 5), jnp.int32)
  run = jax.jit(policy.hidden)
  read = lambda share: run(params, MixedTokens(a, b, jnp.asarray(share, jnp.float32)), seen)
  plain, other = run(params, a, seen), run(params, b, seen)
  np.testing.assert_allclose(read([1.0, 1.0]), plain, atol=1e-5)
  np.testing.assert_allclose(read([0.0, 1.0]), [other[0], plain[1]], atol=1e-5)
  # A mixture is a token whose embedding is the mean of those of two others.
  table = np.array(params['embedding'])
  table[7] = 0.3 * table[1] + 0.7 * table[2]
  whole = {**params, 'embedding': jnp.asarray(table)}
  both = run(
    whole, MixedTokens(jnp.array([[1, 3]]), jnp.array([[2, 3]]), jnp.array([0.3])), seen[:1, :2]
  )
  np.testing.assert_allclose(both, run(whole, jnp.array([[7, 3]]), seen[:1, :2]), atol=1e-5)
  # The pass of the learner reads what the batch has.
  batch = Batch(tokens=a, segment_ids=seen, mask=seen > 0)
  with_b = batch.with_arrays(partner_tokens=b, own_share=jnp.array([1.0, 1.0]))
  assert isinstance(learner.tokens_read(with_b), MixedTokens)
  assert learner.tokens_read(batch) is a


def test_the_mean_of_parameters_is_slow_only_later_and_follows_the_named_network():
  anchor, peer = {'w': jnp.array([1.0])}, {'w': jnp.array([3.0])}
  for step, decay in ((1, 0.997 * np.exp(-5 * 0.9**2)), (5, 0.997 * np.exp(-1.25)), (99, 0.997)):
    for rule in (optim.slow_ema, optim.slow_ema_of_peer):
      found = rule(anchor, peer, jnp.int32(step), decay=0.997, ramp=10)['w']
      np.testing.assert_allclose(found, decay + 3 * (1 - decay), rtol=1e-6)


def test_each_network_gets_the_predictions_of_the_mean_of_the_other_one():
  config = addition(method_of('elr_plus'), pack=0)
  run = build.build(config)
  phase = run.phases['train']
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    other = jax.tree.map(lambda x: x + 0.3, state.anchors['policy_mean'])
    state = state.replace(anchors=state.anchors | {'policy_mean': other})
    got = phase.collect.make(phases.context(run, phase, 0))(
      state, phases.Drawer(phase, seed=0, cursor=0), 0
    )
  batch, size = got.batch, 16
  of_peer = learner.seen_by(batch, 'peer')
  assert not any(name.startswith('peer/') for name in of_peer.features)
  shares = [float(one['own_share'][0]) for one in (batch, of_peer)]
  assert shares[0] != shares[1] and min(shares) >= 0.5 and got.metrics['mixing'] == 1 - shares[0]
  for one, anchor in ((batch, 'peer_mean'), (of_peer, 'policy_mean')):
    rows, width = one.tokens.shape
    share = one['own_share'][0]
    partner = [int(np.flatnonzero((one.tokens == p).all(1))[0]) for p in one['partner_tokens']]
    assert sorted(partner) == list(range(rows))
    own = one['mixed_weights'].reshape(rows, width, 2)[..., 0] > 0
    np.testing.assert_array_equal(one.mask, own | own[partner])
    # 0.3 times the likeliest tokens of the row itself, times the share.
    params = learner.parameter_sets(state, {})[anchor]
    seen = (one.tokens != run.tokenizer.pad_id).astype('i4')
    probs = jax.nn.softmax(run.policy.unembed(params, run.policy.hidden(params, one.tokens, seen)))
    targets = one['early_targets'].reshape(rows, width, 2 * size)
    row, column = np.argwhere(own)[-1]
    expected = np.sort(probs[row, column - 1])[::-1]
    found = targets[row, column, :size] / (0.3 * share)
    np.testing.assert_allclose(found[: len(expected)], expected[:size], rtol=1e-3, atol=1e-6)


def test_what_cannot_work_is_refused():
  config = addition(method_of('elr_plus'), pack=2)
  run = build.build(config)
  with pytest.raises(ValueError, match=r'MixedTargets: a row is mixed .* pack=0'):
    run.phases['train'].collect.make(phases.context(run, run.phases['train'], 0))
  config = addition(method_of('sft'), anchors={'mean': part(optim.slow_ema_of_peer)})
  with pytest.raises(
    ValueError, match=r"anchors.mean: its rule follows an anchor 'peer', which is"
  ):
    build.build(config)
