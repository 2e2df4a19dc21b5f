"""Collectors that branch: further completions of prefixes (`Vines`), and trees (`Trees`)."""

import collections
import dataclasses
import doctest
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, collect, credit, learner, phases
from polgrad.collect import beginnings, branched, splits
from polgrad.collect import trees as growing
from polgrad.collect import vines as vines_module
from polgrad.environments.episodes import Within
from polgrad.models.policy import Policy
from polgrad.registry import bind, part
from polgrad.rewards.scoring import Scores
from polgrad.types import Batch, turns
from tests import examples
from tests.collect_test import collected, experiment
from tests.environments import runs_test
from tests.exploration_test import context_of, state_of

pytestmark = pytest.mark.usefixtures('samplers_once')

SIZES = dict(prompts=4, prompt_length=6, max_new_tokens=5)
SAMPLES = 3  # completions of each prefix


def run_of(kind, estimator, score=None, **settings):
  """What the collector makes of four prompts, with the rows that it has scored, and the run."""
  run = experiment()
  phase = run.phases['train']
  collector = bind(part(kind, **SIZES, **settings), collect.TABLE)
  seen = []

  def noted(texts, records, lengths, others):
    scores = (score or phase.score)(texts, records, lengths, others)
    found = zip(records, others['tokens'](), lengths, scores.total)
    seen.append([(record['id'], tuple(t), n, r) for record, t, n, r in found])
    return scores

  changes = dict(collect=collector, credit=bind(estimator, credit.TABLE), score=noted)
  return collected(run, **changes)[0], seen, run


@pytest.fixture(scope='module')
def vines():
  return run_of(
    collect.Vines,
    part(credit.step_values),
    samples_per_prompt=4,
    split=part(splits.every, tokens=2),
    value_samples=SAMPLES,
  )


def test_step_values_are_mean_rewards_of_completions_of_the_prefix(vines):
  got, (rows, *further), _ = vines
  batch, drawn = got.batch, [row for piece in further for row in piece]
  assert all(n == len(tokens) <= 5 for _, tokens, n, _ in drawn)
  # By prompt and prefix; a group of completions has one prefix at least.
  groups = [drawn[i : i + SAMPLES] for i in range(0, len(drawn), SAMPLES)]
  used = set()
  for b, (prompt, tokens, _, reward) in enumerate(rows):
    mask = batch.mask[b]
    np.testing.assert_array_equal(batch['step_ids'][b, mask], np.arange(len(tokens)) // 2)
    assert (batch['step_ids'][b, ~mask] == -1).all() and not batch['step_values'][b, ~mask].any()
    values = []
    for begin in range(0, len(tokens), 2):
      prefix = tokens[:begin]
      fits = [
        i
        for i, group in enumerate(groups)
        if all(p == prompt and t[:begin] == prefix and len(t) > begin for p, t, _, _ in group)
      ]
      value = batch['step_values'][b, 6 + begin]
      means = {i: np.mean([r for *_, r in groups[i]]) for i in fits}
      match = [i for i in fits if means[i] == pytest.approx(value, abs=1e-6)]
      assert match
      used.update(match)
      values.append(value)
    # Advantages are differences of values, and add up to the reward minus the first value.
    gains = np.diff([*values, reward])
    np.testing.assert_allclose(batch.advantages[b, mask][::2], gains, atol=1e-6)
    assert gains.sum() == pytest.approx(reward - values[0], abs=1e-6)
  assert len(used) == len(groups)


def test_equal_prefixes_share_a_value_and_all_that_was_drawn_is_counted(vines):
  got, (rows, *further), _ = vines
  first = got.batch['step_values'][:, 6].reshape(4, 4)
  np.testing.assert_array_equal(first, np.repeat(first[:, :1], 4, axis=1))
  prefixes = {(p, tokens[:n]) for p, tokens, _, _ in rows for n in range(0, len(tokens), 2)}
  assert got.metrics['continuations/prefixes'] == len(prefixes)
  assert sum(map(len, further)) == SAMPLES * len(prefixes)
  assert len(prefixes) > 16 >= max(map(len, further)) // SAMPLES  # several calls of the sampler
  longest = SAMPLES * sum(5 - len(prefix) for _, prefix in prefixes)
  assert SAMPLES * len(prefixes) <= got.metrics['continuations/tokens'] <= longest
  assert got.metrics['steps'] == np.mean([(len(tokens) + 1) // 2 for _, tokens, _, _ in rows])
  # The rows themselves are those of plain rollouts; further completions have other noise.
  plain = collected(experiment())[0].batch
  np.testing.assert_array_equal(got.batch.tokens, plain.tokens)
  np.testing.assert_array_equal(got.batch.behavior_logp, plain.behavior_logp)
  of_prompt = lambda rows: collections.Counter(t for p, t, _, _ in rows if p == rows[0][0])
  assert of_prompt(further[0]) != of_prompt(rows)


def test_a_memory_has_room_for_what_vines_add(vines):
  batch = vines[0].batch
  settings = dict(samples_per_prompt=4, split=part(splits.every, tokens=2), lag=1)
  blank = bind(part(collect.Vines, **SIZES, **settings), collect.TABLE).init().batches
  for name in ('step_ids', 'step_values', 'tokens'):
    assert (blank[name].shape[1:], blank[name].dtype) == (batch[name].shape, batch[name].dtype), (
      name
    )


def test_a_row_with_a_failed_completion_of_a_prefix_leaves_the_loss():
  real, calls = experiment().phases['train'].score, []

  def sometimes(texts, records, lengths, others):
    scores = real(texts, records, lengths)
    calls.append(len(texts))
    if len(calls) != 2:
      return scores
    bad = np.arange(len(texts)) == 1  # one of the first prefix, which is the first prompt
    return scores._replace(
      total=np.where(bad, np.nan, scores.total), valid=~bad, errors={'short/ValueError': 1}
    )

  settings = dict(samples_per_prompt=4, split=part(splits.every), value_samples=SAMPLES)
  got, _, _ = run_of(collect.Vines, part(credit.step_values), sometimes, **settings)
  bad = np.arange(16) < 4
  np.testing.assert_array_equal(got.batch.valid, ~bad)
  np.testing.assert_array_equal(got.batch.mask.any(axis=1), ~bad)
  assert np.isfinite(got.batch.advantages).all() and np.isfinite(got.batch['step_values']).all()
  assert got.metrics['verifier_errors'] == got.metrics['verifier_errors/short/ValueError'] == 1


def test_examples_of_steps_print_what_they_say():
  found = doctest.testmod(splits)
  assert found.attempted == 4 and not found.failed


def test_vines_with_beginnings_that_are_given_are_refused():
  with pytest.raises(ValueError, match='beginning'):
    bind(part(collect.Vines, beginning=part(beginnings.uniform)), collect.TABLE)


TABLE = np.random.default_rng(0).normal(size=(4, 3))  # log-odds of a token after another one


def chain() -> Policy:
  """The next token, out of 0, 1 and 2, depends on the last one; 3 is the prompt."""
  seen = lambda tokens: jax.nn.one_hot(tokens, 4)
  wide = lambda logits: jnp.pad(
    logits, [(0, 0)] * (logits.ndim - 1) + [(0, 1)], constant_values=-1e9
  )
  return Policy(
    config=types.SimpleNamespace(vocab_size=4, balance_rate=0.0),
    shapes=None,
    init=None,
    hidden=lambda params, tokens, segment_ids: seen(tokens),
    completions=None,
    states=None,
    unembed=lambda params, hidden: wide(hidden @ params['table']),
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


def test_values_of_states_have_the_true_mean_and_variance():
  """E V = p and Var V = p (1 - p) / K, for all prefixes of a policy with 27 completions."""
  prompts, samples = 60, 5
  right = lambda tokens: float(sum(tokens) % 3 == 0)
  score = lambda texts, *_: Scores(
    np.array([right([int(i) for i in text.split()]) for text in texts]),
    *({}, np.ones(len(texts), bool), {}, []),
  )
  settings = dict(prompts=prompts, samples_per_prompt=2, prompt_length=1, max_new_tokens=3)
  settings |= dict(split=part(splits.every, tokens=1), value_samples=samples)
  collector = bind(part(collect.Vines, **settings), collect.TABLE)
  context = context_of(chain(), lambda text: [3], score=score, estimator=credit.step_values())
  draw = lambda count: [{'id': i, 'prompt': '3'} for i in range(count)]
  with jax.set_mesh(context.mesh):
    batch = collector.make(context)(state_of({'table': jnp.asarray(TABLE)}), draw, 0).batch
  odds = np.exp(TABLE) / np.exp(TABLE).sum(axis=1, keepdims=True)

  def truth(prefix):
    """The probability that a completion of the prefix is right."""
    total = 0.0
    for rest in itertools.product(range(3), repeat=3 - len(prefix)):
      whole = (3, *prefix, *rest)
      pairs = list(itertools.pairwise(whole))[len(prefix) :]
      total += np.prod([odds[pair] for pair in pairs]) * right(whole[1:])
    return total

  found = {
    (i, tuple(row[1 : 1 + n].tolist())): batch['step_values'][b, 1 + n]
    for b, (i, row) in enumerate(zip(batch.prompt_ids.tolist(), batch.tokens))
    for n in range(3)
  }
  p = np.array([truth(prefix) for _, prefix in found])
  variance = p * (1 - p) / samples
  gap = np.array(list(found.values())) - p
  assert abs(gap.sum()) < 4 * np.sqrt(variance.sum())
  for prefix in {prefix for _, prefix in found}:
    same = np.array([other == prefix for _, other in found])
    assert abs(gap[same].sum()) < 4 * np.sqrt(variance[same].sum())
  assert (gap**2).sum() == pytest.approx(variance.sum(), rel=4 * np.sqrt(2 / len(gap)))


FOREST = dict(trees=2, iterations=2, forks=2, branches=2, samples_per_prompt=4)


@pytest.fixture(scope='module')
def grown():
  """The rows of all leaves, the rows that are trained on, and the report of both."""
  run = experiment()
  settings = bind(part(collect.Trees, **SIZES, **FOREST), collect.TABLE)
  changes = dict(collect=settings, credit=bind(part(credit.tree_values), credit.TABLE))
  phase = examples.changed(run.phases['train'], **changes)
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    steps = settings.make(phases.context(run, phase, 0)).__self__
    drawn, records = steps.sample(state, phases.Drawer(phase, seed=0, cursor=0), 0)
    leaves = drawn.batch
    logp = np.asarray(learner.forward(run.policy, state.params, leaves).logp)
    scored, _ = super(type(steps), steps).score(drawn, records, state, None, 0)
    batch, report = steps.score(drawn, records, state, None, 0)
  return leaves, logp, scored, batch, report


def test_leaves_share_tokens_with_the_row_that_they_were_forked_off(grown):
  leaves, logp, *_ = grown
  rows, drawn_by = len(leaves.tokens), leaves['drawn_by']
  assert rows == 4 * 2 * 9
  np.testing.assert_array_equal(leaves.group_ids, np.arange(rows) // 18)
  # What was drawn elsewhere has the tokens and the log-probs of that row, at the same columns.
  columns = np.arange(leaves.tokens.shape[1])[None]
  for name in ('tokens', 'behavior_logp'):
    np.testing.assert_array_equal(leaves[name], leaves[name][drawn_by, columns])
  np.testing.assert_array_equal(drawn_by // 18, np.repeat(np.arange(4), 18)[:, None] + 0 * columns)
  own = drawn_by == np.arange(rows)[:, None]
  assert (np.diff(own.astype(int), axis=1) >= 0).all() and own[:, -1].all()
  # Every token has the probability that the policy gives it.
  where = leaves.mask
  np.testing.assert_allclose(leaves.behavior_logp[where], logp[where], atol=1e-5)
  assert (where.sum(axis=1) <= 5).all() and where[:, 6].all()
  ended = np.array([row[mask][-1] == 1 for row, mask in zip(leaves.tokens, where)])
  np.testing.assert_array_equal(leaves.finished, ended)
  assert len({tuple(row) for row in leaves.tokens}) > rows / 2


def test_forks_are_at_the_least_likely_tokens(grown):
  leaves, *_ = grown
  drawn_by = leaves['drawn_by']
  for start in range(0, len(drawn_by), 18):
    for first in (start, start + 1):  # the first leaf of each tree
      logp = np.where(leaves.mask[first], leaves.behavior_logp[first], np.inf)
      least = np.argsort(logp)[: min(2, leaves.mask[first].sum())]
      begins = (drawn_by[start : start + 18] != first).argmax(axis=1)
      # Of those that have tokens of this leaf, or begin anew, some do at each of the two places.
      assert set(least) <= set(begins.tolist()) | {6}


def test_forks_leave_out_tokens_that_were_forked_before():
  batch = Batch(
    tokens=np.zeros((3, 4), np.int32),
    segment_ids=np.ones((3, 4), np.int32),
    mask=np.array([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]], bool),
    behavior_logp=np.array([[0, -1, -3, -2], [0, -1, -5, -4], [0, -1, 0, 0]], np.float32),
    prompt_ids=np.array([7, 7, 8], np.int32),
  )
  drawn_by = np.array(
    [[0] * 4, [0, 0, 1, 1], [2] * 4]
  )  # row 1 was forked off row 0 at its column 2
  batch = batch.with_arrays(drawn_by=drawn_by)
  none = np.zeros((3, 4), bool)
  got = growing._forks(batch, np.array([0, 0, 1]), none, 2, [])
  assert list(zip(got.rows, got.columns)) == [(1, 2), (1, 3), (2, 1), (2, 1)]
  assert len(set(got.ids.tolist())) == 4
  none[1, 2] = none[2, 1] = True
  again = growing._forks(batch, np.array([0, 0, 1]), none, 2, [7, 7, 8, 8])
  assert list(zip(again.rows, again.columns)) == [(1, 3), (0, 2), (2, 1), (2, 1)]
  assert not set(again.ids.tolist()) & set(got.ids.tolist())


def test_some_leaves_are_trained_on_and_their_nodes_have_the_values_of_all(grown):
  leaves, _, scored, batch, report = grown
  assert batch.tokens.shape[0] == 16 and set(report.terms['short'].shape) == {16}
  np.testing.assert_array_equal(batch.group_ids, np.arange(16) // 4)
  best = scored.rewards.reshape(4, -1).max(axis=1)
  np.testing.assert_array_equal(batch.rewards.reshape(4, -1).max(axis=1), best)
  rewards = scored.rewards.reshape(4, -1)
  own = (rewards - rewards.mean(axis=1, keepdims=True)) * 18 / 17
  last = np.array([np.flatnonzero(mask)[-1] for mask in batch.mask])
  at_leaf = batch['node_values'][np.arange(16), last].reshape(4, -1)
  for group in range(4):
    for row in range(4):
      match = np.isclose(batch.rewards.reshape(4, -1)[group, row], rewards[group])
      assert np.isclose(own[group][match], at_leaf[group, row], atol=1e-5).all()
  first = batch.mask & (np.arange(11) == 6)
  assert not batch['parent_values'][first].any() and (batch['parent_leaves'][first] == 4).all()
  assert (batch['node_leaves'][batch.mask] >= 1).all() and batch['node_leaves'].max() <= 4
  assert report.metrics['trees/tokens'] < leaves.mask.sum()
  share = 1 - report.metrics['trees/tokens'] / leaves.mask.sum()
  assert report.metrics['trees/shared'] == pytest.approx(share)


def test_leaves_are_chosen_at_random_with_one_of_the_best():
  random = np.random.default_rng(0)
  rewards = np.array([0, 1, 0, 0, 0.0, 0, 0, 0, 0, 1])
  valid = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1, 0], bool)
  drawn = np.array([growing.chosen(rewards, valid, 5, 2, random) for _ in range(200)])
  assert (drawn[:, :2] == 1).any(axis=1).all() and set(drawn[:, :2].flat) == set(range(5))
  np.testing.assert_array_equal(np.unique(drawn[:, 2:], axis=0), [[5, 8]])


def test_more_trained_leaves_than_there_are_are_refused():
  with pytest.raises(ValueError, match='31, but a prompt has only 30 leaves'):
    bind(part(collect.Trees, samples_per_prompt=31), collect.TABLE)


@pytest.fixture(scope='module')
def episodes():
  """Vines on an environment that answers with a digit of its seed, and all rows that were scored."""
  run = build.build(
    runs_test.config(
      kind=collect.Vines, value_samples=SAMPLES, samples_per_prompt=2, max_new_tokens=12
    )
  )
  phase = examples.changed(run.phases['train'], credit=credit.step_values())
  seen = []
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    steps = phase.collect.make(phases.context(run, phase, 0)).__self__
    judge = vines_module.RolloutSteps._judge

    def noted(self, rows, records):
      judged = judge(self, rows, records)
      seen.append((rows.episodes, judged[0]))
      return judged

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(vines_module.RolloutSteps, '_judge', noted)
      got = steps.collect(state, phases.Drawer(phase, seed=0, cursor=0), 0)
  return run, got, seen


def test_a_turn_is_a_step_whose_value_is_what_continued_episodes_still_earn(episodes):
  _, got, ((sources, _), *further) = episodes
  batch = got.batch
  continued = [(e, rows, i) for some, rows in further for i, e in enumerate(some)]
  spans = [turns(mask) for mask in batch.mask]
  prefixes = [(row, number) for row in range(len(spans)) for number in range(len(spans[row]))]
  assert len(prefixes) * SAMPLES == len(continued) and max(n for _, n in prefixes) == 2
  assert not any(episode.states for episode in got.episodes)
  values = {}
  for place, (row, number) in enumerate(prefixes):
    source, column = sources[row], spans[row][number].start
    group = continued[place * SAMPLES : (place + 1) * SAMPLES]
    for episode, rows, i in group:
      # The episode continues from its state: the same words before, the same digit of the seed after.
      assert episode.turns[:number] == source.turns[:number]
      assert {*episode.observations} <= {*source.observations} | {str(source.states[0][0] % 10)}
      np.testing.assert_array_equal(rows.tokens[i, :column], batch.tokens[row, :column])
      assert rows.mask[i, column] and len(episode.turns) == len(episode.rewards)
      assert rows.tokens.shape[1] == batch.tokens.shape[1]
      np.testing.assert_array_equal(rows['turn_rewards'][i].sum(), np.float32(sum(episode.rewards)))
    values[row, number] = np.mean([sum(e.rewards[number:]) for e, _, _ in group])
  for row, own in enumerate(spans):
    for number, span in enumerate(own):
      assert (batch['step_ids'][row, span] == number).all()
      got_values = batch['step_values'][row, span]
      np.testing.assert_allclose(got_values, values[row, number], atol=1e-6)
      following = values.get((row, number + 1), 0.0)
      want = sources[row].rewards[number] + following - values[row, number]
      np.testing.assert_allclose(batch.advantages[row, span], want, atol=1e-5)


def test_rows_with_less_room_end_like_rows_whose_columns_are_used_up():
  class Echo:
    """Answers each turn with two tokens, and notes what it was asked."""

    def __init__(self):
      self.asked = []

    def ask(self, row, ids, ended):
      self.asked.append((row, list(ids), ended))

    def take(self, wait):
      return [(row, None if ids[-1] == 0 else [8, 9]) for row, ids, _ in self.asked[-1:]]

  def said(room, *turns_of_row):
    inner = Echo()
    replies = Within(inner, [room])
    answers = []
    for ids in turns_of_row:
      replies.ask(0, ids, True)
      answers += replies.take(True)
    return [(ids, ended) for _, ids, ended in inner.asked], answers, replies.unfinished

  # Three tokens and two of a reply leave one of six columns.
  asked, answers, cut = said(6, [1, 1, 1], [2, 2])
  assert asked == [([1, 1, 1], True), ([2], False)]
  assert answers == [(0, [8, 9]), (0, None)] and cut == {0}
  # The reply would fill the row.
  assert said(5, [1, 1, 1])[1:] == ([(0, None)], {0})
  # The last turn ends in the last column.
  assert said(6, [1, 1, 1], [0])[1:] == ([(0, [8, 9]), (0, None)], set())


def test_a_row_is_copied_more_often_where_the_entropy_rises():
  """The rule: a row is copied if clip(u - weight rise, 0, 1) <= threshold, u uniform."""
  u = (np.arange(1000) + 0.5) / 1000
  for rise, weight, threshold in itertools.product(
    (-9, -1, 0, 1, 3, 9), (-0.2, 0, 0.2), (0, 0.5, 1)
  ):
    rate = np.mean(np.clip(u - weight * rise, 0, 1) <= threshold)
    assert branched.copy_chance(rise, weight, threshold) == pytest.approx(rate, abs=1e-9)
  assert not doctest.testmod(branched).failed


@pytest.fixture(scope='module')
def copied():
  """Four rows of each prompt, two of which start at it; every reply has a copy while rows are left."""
  settings = dict(kind=collect.Branched, samples_per_prompt=4, max_new_tokens=12, threshold=1.0)
  run = build.build(runs_test.config(**settings))
  phase = run.phases['train']
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    steps = phase.collect.make(phases.context(run, phase, 0)).__self__
    draw = lambda number: phases.Drawer(phase, seed=0, cursor=0)(number)
    drawn, records = steps.sample(state, draw, 0)
    logp = np.asarray(learner.forward(run.policy, state.params, drawn.batch).logp)
    batch, report = steps.score(drawn, records, state, draw, 0)

  def sample(**changes):
    other = dataclasses.replace(steps.settings, **changes)
    with jax.set_mesh(run.mesh):
      return dataclasses.replace(steps, settings=other).sample(state, draw, 0)[0]

  return drawn, logp, batch, report, sample


def test_copies_go_on_from_the_state_behind_a_reply(copied):
  drawn, logp, batch, report, _ = copied
  assert len(batch.tokens) == 16 and 'anew' not in batch
  np.testing.assert_array_equal(batch.group_ids, np.arange(16) // 4)
  anew = drawn.batch['anew'].reshape(4, 4)
  assert not anew[:, :2].any() and (anew[:, 2:] > 0).all()  # all rows have a reply to continue from
  for row in np.flatnonzero(anew):
    own = drawn.episodes[row]
    turn, group = anew.flat[row], range(row - row % 4, row)
    start = turns(batch.mask[row])[turn].start
    same = [i for i in group if np.array_equal(batch.tokens[i, :start], batch.tokens[row, :start])]
    assert same and own.turns[:turn] == drawn.episodes[same[0]].turns[:turn]
    digits = {*own.observations}
    assert len(digits) == 1 and digits == {*drawn.episodes[same[0]].observations}
    assert batch['turn_rewards'][row].sum() == pytest.approx(sum(own.rewards))
  assert not any(episode.states for episode in drawn.episodes)
  np.testing.assert_allclose(batch.behavior_logp[batch.mask], logp[batch.mask], atol=1e-5)
  assert len({tuple(row) for row in batch.tokens}) == 16
  assert report.metrics['branches/copies'] == 0.5
  assert (
    batch.mask.sum() > report.metrics['branches/tokens'] > batch.mask.reshape(4, 4, -1)[:, :2].sum()
  )


def test_rows_that_are_left_start_at_the_prompt_with_seeds_of_their_own(copied):
  *_, sample = copied
  drawn = sample(threshold=0.0, entropy_weight=0.0)
  assert len(drawn.batch.tokens) == 16 and not drawn.batch['anew'].any()
  seen = [{*episode.observations} for episode in drawn.episodes]
  groups = [set.union(*seen[i : i + 4]) for i in range(0, 16, 4)]
  assert max(map(len, groups)) > 2
