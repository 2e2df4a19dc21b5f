"""PROPS: later draws go where the policy should have been sampled more."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import collect, credit, optim, sharding
from polgrad.collect import exploration
from polgrad.data import tokenizers
from polgrad.models.policy import Policy
from polgrad.objectives import Objective
from polgrad.registry import bind, part
from polgrad.rewards.scoring import Scores
from polgrad.types import Batch, TrainState
from tests import examples
from tests.collect_test import collected, experiment

ARMS = np.array([0.5, 0.0, -0.5, -1.0], np.float32)
BANDITS = 100
VOCABULARY = len(ARMS) + BANDITS


class Reader(Objective):
  """Reads log-probs of the start of the phase; the collector asks nothing else of an objective."""

  requires = frozenset({'proximal_logp'})

  def apply(self, outputs, batch, state, *, step):
    raise AssertionError('nothing is trained here')


def bandits() -> Policy:
  """Prompt i is the token ARMS + i, its completion an arm: as many policies as prompts."""

  def unembed(params, hidden):
    arms = hidden[..., len(ARMS) :] @ params['table']
    return jnp.pad(arms, [(0, 0)] * (arms.ndim - 1) + [(0, BANDITS)], constant_values=-1e9)

  seen = lambda tokens: jax.nn.one_hot(tokens, VOCABULARY)
  return Policy(
    config=types.SimpleNamespace(vocab_size=VOCABULARY, balance_rate=0.0),
    shapes=None,
    init=None,
    hidden=lambda params, tokens, segment_ids: seen(tokens),
    completions=None,
    states=None,
    unembed=unembed,
    readout=lambda params: params,
    value=None,
    init_cache=lambda batch, length: {},
    begin=lambda cache, read, rows: cache,
    widen=None,
    unstack=lambda params: params,
    decode=lambda params, tokens, positions, valid, cache, index: (seen(tokens), cache),
    axes=None,
    labels=lambda tree: jax.tree.map(lambda _: 'train', tree),
  )


def context_of(policy: Policy, encode, *, score, estimator=None) -> collect.Context:
  """What a collector reads of a run, with a policy that is no transformer."""
  tokenizer = tokenizers.Tokenizer(
    encode=encode,
    decode=lambda ids: ' '.join(map(str, ids)),
    chat=None,
    conversation=None,
    vocab_size=policy.config.vocab_size,
    pad_id=0,
    bos_id=-1,
    stop_ids=(),
  )
  return collect.Context(
    policy=policy,
    tokenizer=tokenizer,
    mesh=sharding.make_mesh(),
    seed=0,
    objective=Reader(),
    credit=estimator or credit.nothing(),
    score=score,
    frozen={},
    micro_batches=1,
  )


def state_of(params) -> TrainState:
  zero = jnp.int32(0)
  return TrainState(
    step=zero,
    phase=zero,
    phase_step=zero,
    update=zero,
    cursor=zero,
    skipped=zero,
    params=params,
    opt_state=(),
    anchors={},
    collect_state=(),
    credit_state=(),
    objective_state=(),
  )


def sampling_error(collector: collect.Collector) -> float:
  """KL(empirical, policy) of the arms drawn, averaged over the bandits; also checks the log-probs."""
  score = lambda texts, *_: Scores(np.zeros(len(texts)), {}, np.ones(len(texts), bool), {}, [])
  context = context_of(bandits(), lambda text: [len(ARMS) + int(text)], score=score)
  state = state_of({'table': jnp.tile(ARMS[None], (BANDITS, 1))})
  draw = lambda count: [{'id': i, 'prompt': str(i)} for i in range(count)]
  with jax.set_mesh(context.mesh):
    batch = collector.make(context)(state, draw, 0).batch
  log_policy = np.asarray(jax.nn.log_softmax(ARMS))
  arms = batch.tokens[:, 1].reshape(BANDITS, -1)
  np.testing.assert_allclose(
    batch.proximal_logp[:, 1].reshape(arms.shape), log_policy[arms], atol=1e-5
  )
  shares = (arms[..., None] == np.arange(len(ARMS))).mean(axis=1)
  logs = np.log(np.where(shares > 0, shares, 1))
  return float((shares * (logs - log_policy)).sum(axis=1).mean())


def test_sampling_error_is_less_with_ros_and_least_with_props():
  """64 draws of four arms; independent ones err by (K - 1) / 2n = .0234 nats in expectation.

  ROS makes a step of size 1 a bandit. On a table larger ones do better still: bandits share nothing.
  """
  shape = dict(prompts=BANDITS, samples_per_prompt=64, prompt_length=1, max_new_tokens=1)
  props = part(collect.Explored, optimizer=part(optim.adamw, learning_rate=0.03), **shape)
  ros = part(
    collect.Explored,
    optimizer=part(optim.sgd, learning_rate=1.0 * BANDITS),
    eps=float('inf'),
    epochs=1,
    minibatches=1,
    **shape,
  )
  specs = {'on-policy': part(collect.Rollouts, **shape), 'ros': ros, 'props': props}
  error = {name: sampling_error(bind(spec, collect.TABLE)) for name, spec in specs.items()}
  assert error['props'] < 0.85 * error['ros'] < 0.85**2 * error['on-policy']
  want = {'on-policy': 0.0247, 'ros': 0.0177, 'props': 0.0135}
  assert error == pytest.approx(want, rel=0.15)


def test_one_step_against_what_was_drawn_keeps_the_shares_near_the_policy():
  """Five arms, a step of size 1/2 on the log-likelihood of all draws before each draw, 100 seeds."""
  policy = jnp.array([0.4, 0.3, 0.15, 0.1, 0.05])
  surrogate = exploration.avoidance(eps=float('inf')).surrogate
  loss = lambda logits, counts: jnp.sum(
    counts * surrogate(jax.nn.log_softmax(logits) - jnp.log(policy), -jnp.ones(5))
  )

  def draw(counts, key, size):
    logits = jnp.log(policy) - size * jax.grad(loss)(jnp.log(policy), counts)
    counts += jax.nn.one_hot(jax.random.categorical(key, logits), 5)
    return counts, 0.5 * jnp.abs(counts / counts.sum() - policy).sum()

  @jax.jit
  @jax.vmap
  def distances(key):
    sizes, keys = jnp.array([0.0, 0.5]), jax.random.split(key, 400)
    run = lambda size: jax.lax.scan(lambda c, k: draw(c, k, size), jnp.zeros(5), keys)[1]
    return jax.vmap(run)(sizes)[:, jnp.array([19, 99, 399])]

  plain, adapted = np.mean(distances(jax.random.split(jax.random.key(0), 100)), axis=0)
  np.testing.assert_allclose(plain, [0.150, 0.073, 0.036], rtol=0.12)
  np.testing.assert_allclose(adapted, [0.076, 0.018, 0.004], rtol=0.12)


def explored(**settings):
  """Sixteen rows of the tiny model, four prompts in two rounds of two samples."""
  run = experiment()
  settings = (
    dict(prompts=4, samples_per_prompt=4, rounds=2, prompt_length=6, max_new_tokens=5) | settings
  )
  collector = bind(part(collect.Explored, **settings), collect.TABLE)
  objective = run.phases['train'].objective
  objective = examples.changed(objective, requires=objective.requires | {'proximal_logp'})
  return collected(run, collect=collector, objective=objective)[0].batch


def test_only_the_later_rounds_are_drawn_by_another_policy():
  batch = explored(optimizer=part(optim.adamw, learning_rate=1e-2), kl_limit=1.0)
  gap = np.where(batch.mask, np.abs(batch.behavior_logp - batch.proximal_logp), 0).max(axis=1)
  first = np.arange(16) % 4 < 2
  assert gap[first].max() < 1e-5 and (gap[~first] > 1e-3).all()
  np.testing.assert_array_equal(batch.group_ids, np.arange(16) // 4)
  prompts = np.where(batch.segment_ids[:, :6] > 0, batch.tokens[:, :6], -1).reshape(4, 4, 6)
  np.testing.assert_array_equal(prompts, np.broadcast_to(prompts[:, :1], prompts.shape))


def test_without_steps_all_rows_are_drawn_from_the_policy_with_noise_of_their_own():
  batch = explored(optimizer=part(optim.sgd, learning_rate=0.0))
  np.testing.assert_allclose(batch.behavior_logp, batch.proximal_logp * batch.mask, atol=1e-5)
  made = [tuple(row) for row in batch.tokens[:, 6:]]
  assert len(set(made)) > 12


def test_passes_end_with_the_update_that_is_past_the_limit_and_keep_it():
  seen = []

  def update(state, cut):
    seen.append(cut)
    return state + 1, {'sampler_kl': 0.004 * cut}

  assert exploration.avoid(update, 0, range(10), kl_limit=0.01) == 4 and seen == [0, 1, 2, 3]
  assert exploration.avoid(update, 0, range(3), kl_limit=0.01) == 3


def test_rounds_lie_side_by_side_and_those_to_come_are_masked_out():
  def drawn(first):
    rows = np.arange(first, first + 4)
    column = rows[:, None]
    mask = np.ones((4, 1), bool)
    return Batch(
      tokens=column,
      segment_ids=column,
      mask=mask,
      behavior_logp=column,
      finished=rows,
      prompt_ids=rows,
      group_ids=rows // 2,
    )

  got = exploration.joined([drawn(0), drawn(10)], 3, prompts=2)
  shown = np.array([0, 1, 10, 11, 0, 1, 2, 3, 12, 13, 2, 3])
  np.testing.assert_array_equal(got.tokens[:, 0], shown)
  np.testing.assert_array_equal(got.mask[:, 0], [1, 1, 1, 1, 0, 0] * 2)


@pytest.mark.parametrize(
  'wrong, words',
  [
    (dict(rounds=3), 'group of 8 is not drawn in 3'),
    (dict(rounds=0), 'rounds: expected a number at least 1'),
    (dict(minibatches=3), '8 prompts do not divide into 3'),
    (dict(eps=0.0), 'eps'),
    (dict(kl_limit=-1.0), 'kl_limit'),
  ],
)
def test_settings_that_cannot_be_are_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    bind(part(collect.Explored, **wrong), collect.TABLE)


def test_minibatches_that_the_devices_cannot_share_are_refused():
  with pytest.raises(ValueError, match='minibatches of 4 rows do not divide into 8 micro_batches'):
    run = experiment()
    collector = bind(
      part(collect.Explored, prompts=4, samples_per_prompt=4, prompt_length=6, max_new_tokens=5),
      collect.TABLE,
    )
    collected(run, collect=collector, micro_batches=8)
