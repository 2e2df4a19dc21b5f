"""What changes of the sampling do to a gradient, exactly: identities, and rows of the report again."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest

from benchmarks import estimators, estimators_page
from benchmarks import sampling_estimators as sampling
from polgrad.collect import picks, replay, starts
from polgrad.tabular import enumerable
from polgrad.tabular.estimators import gradients
from polgrad.tabular.outcomes import best_chances, first_chances, outcomes

NUMBERS = json.loads(estimators_page.SAMPLING.read_text())


@pytest.fixture(autouse=True)
def _float64(x64):
  del x64


def slopes(found: np.ndarray) -> np.ndarray:
  """The factor of the gradient of each prompt's success rate; the gradient must have no other part.

  The gradient of p = a b by the logits is written out: p (1 - a) of the first right token, p (1 - b) of
  the second one, and their negatives for the wrong tokens.
  """
  factors = []
  for (a, b), own in zip(sampling.TOKENS, found.reshape(sampling.PROMPTS, 3, 2)):
    first, second = a * b * (1 - a), a * b * (1 - b)
    true = np.array([[-first, first], [0, 0], [-second, second]])
    factor = (own * true).sum() / np.square(true).sum()
    np.testing.assert_allclose(own, factor * true, atol=1e-9)
    factors.append(factor)
  return np.array(factors)


def test_uniform_prompts_and_independent_rows_have_no_bias():
  parts = sampling.base()
  found = sampling.plain(parts)
  np.testing.assert_allclose(slopes(found.mean), 1 / sampling.PROMPTS, rtol=1e-9)
  law = sampling.groups()
  each = sampling.found(law, parts)
  spread = law.chance @ np.square(each - found.mean).sum(axis=1)
  np.testing.assert_allclose(found.variance, spread, rtol=1e-9)


@pytest.mark.parametrize('attempts', [0, 1, 3])
def test_dynamic_sampling_multiplies_the_gradient_by_one_number(attempts):
  found = sampling.filtered(sampling.base(), attempts=attempts)
  p = sampling.RATES
  dull = np.mean(p**4 + (1 - p) ** 4)
  times = sum(dull**n for n in range(attempts + 1))
  np.testing.assert_allclose(slopes(found.mean), times / sampling.PROMPTS, rtol=1e-9)


def test_dapo_climbs_a_mean_of_a_function_of_success_rates():
  """F'(p) from the binomial distribution of right rows; half, for a mean over two tokens."""
  found = slopes(sampling.filtered(sampling.DAPO(), attempts=2).mean)
  p = sampling.RATES
  k = np.arange(1, 4)[:, None]
  ways = np.array([4, 6, 4])[:, None]
  unbiased = np.sqrt(k / 4 * (1 - k / 4) * 4 / 3)
  # (1/G) sum A_i s_i is k (G - k) / G^2 / deviation times the gap of the means of s.
  share = k / 4 * (1 - k / 4) / unbiased
  expected = np.sum(ways * p**k * (1 - p) ** (4 - k) * share, axis=0)
  dull = np.mean(p**4 + (1 - p) ** 4)
  expected *= (1 + dull + dull**2) / (p * (1 - p)) / sampling.PROMPTS / 2
  np.testing.assert_allclose(found, expected, rtol=1e-4)  # the loss divides by the deviation + 1e-6


def test_replay_by_priority_is_unbiased_with_unscaled_weights():
  choice = dict(priority=replay.deviation, exponent=0.6, older=2)
  law = sampling.replayed(**choice, correction=1.0, scaled=False)
  found = sampling.moments(law, sampling.base())
  np.testing.assert_allclose(slopes(found.mean), 1 / sampling.PROMPTS, rtol=1e-6)  # float32 weights
  np.testing.assert_allclose(
    law.scale, 1.0, rtol=1e-6
  )  # whatever the group is, and so for any loss
  for other in ({}, {'correction': 1.0}):
    biased = slopes(sampling.moments(sampling.replayed(**choice, **other), sampling.base()).mean)
    assert np.ptp(biased) > 1e-4 * biased.mean()


def test_weights_of_replayed_groups_multiply_their_gradients():
  """The gradient of two groups is linear in the weights, and a group of weight 0 is not there."""
  parts = sampling.method('prioritized_replay', steps=1)()
  one, two, other = [3, 0, 1, 2], [7, 7, 4, 5], [8, 11, 8, 8]
  rows = np.array([one + two] * 4 + [one + other])
  weight = np.repeat(np.array([[1, 1], [1, 0.3], [1, 0], [0, 1], [1, 0]]), 4, axis=1)
  features = {'replay_weight': weight, 'group_ids': np.tile(np.arange(8) // 4, (5, 1))}
  found = gradients(sampling.setting(), parts.credit, parts.objective, rows, features)
  both, some, first, second, first_again = found
  np.testing.assert_allclose(some, first + 0.3 * second, atol=1e-12)
  np.testing.assert_allclose(both, first + second, atol=1e-12)
  np.testing.assert_allclose(first_again, first, atol=1e-12)
  assert min(np.abs(first).max(), np.abs(second).max()) > 1e-3


def test_prompts_count_as_often_as_they_are_drawn_unless_they_are_weighted():
  share = np.array([0.1, 0.2, 0.3, 0.4])
  parts = sampling.base()
  np.testing.assert_allclose(slopes(sampling.by_prompt(share)(parts).mean), share, rtol=1e-9)
  weights = replay.importance_weights(share, 1.0, scaled=False)
  found = sampling.by_prompt(share, weights)(parts).mean
  np.testing.assert_allclose(slopes(found), 1 / 4, rtol=1e-9)


def test_a_curriculum_is_asked_with_what_its_documentation_says():
  p = sampling.RATES
  weights = np.sqrt(p * (1 - p)) + 0.05
  spo = sampling.drawn_by(sampling.curricula.spo(), sampling.at_rest())
  np.testing.assert_allclose(spo, weights / weights.sum(), rtol=1e-5)  # rates are float32
  magnitude = sum(
    c * 2 * np.sqrt(k / 4 * (1 - k / 4)) for k, c in enumerate(sampling.binomial(p, 4))
  )
  by_values = np.exp(magnitude) / np.exp(magnitude).sum()
  np.testing.assert_allclose(sampling.by_bandit(), by_values, rtol=1e-6)
  pairs = sampling.budgeted()
  assert all(sum(sizes.values()) == 8 and len(sizes) == 2 for _, sizes in pairs)
  np.testing.assert_allclose(sum(chance for chance, _ in pairs), 1)


def test_starts_by_variance():
  variance = sampling.RATES * (1 - sampling.RATES)
  expected = 0.5 / 4 + 0.5 * starts.probabilities(variance)
  np.testing.assert_allclose(sampling.started_by_variance(), expected, rtol=1e-6)


def test_beginnings_are_given_with_their_probabilities():
  np.testing.assert_allclose(sampling.hint_chances(sampling.RESETS), [0.5, 0.5])
  p = 0.05 + 0.9 * (1 + np.cos(np.pi * 50 / 100)) / 2
  np.testing.assert_allclose(sampling.hint_chances(sampling.ANNEALED, 49), [1 - p, p])


@pytest.mark.parametrize(
  'law',
  [
    sampling.groups,
    sampling.inpainted_law,
    lambda: sampling.continued(1),
    lambda: sampling.groups(2),
  ],
)
def test_probabilities_of_batches_add_up_to_one(law):
  np.testing.assert_allclose(law().chance.sum(), 1, rtol=1e-9)


def test_igpo_changes_groups_without_a_right_row_alone():
  law = sampling.inpainted_law()
  given = law.features['injected'].any(axis=(1, 2))
  assert given.any() and (sampling.right(law)[given] <= 2).all()
  # 7/8 of the hints have a token: eta above 1/4 of [.2, .6].
  a, b = np.array(sampling.TOKENS).T
  attempt = a * b / 8 + 7 / 8 * b
  never = (1 - a * b) ** 4 * (1 - attempt) ** 4
  np.testing.assert_allclose(law.chance[sampling.right(law) == 0].sum(), never.mean(), rtol=1e-9)


def test_for_two_rewards_some_filters_of_rows_are_the_same():
  rewards = np.array(list(itertools.product([0.0, 1.0], repeat=4)))
  weights = lambda name: picks.filter_weights(rewards, np.ones(rewards.shape, bool), strategy=name)
  np.testing.assert_allclose(weights('best_half'), weights('best_worst'))
  np.testing.assert_allclose(weights('power'), weights('best'))


@pytest.mark.parametrize(
  'name', ['dynamic sampling, at most twice', 'prompts by `spo`', 'prompts by `sec`', '`dapo`']
)
def test_the_report_is_what_the_code_does(name):
  for key, value in sampling.measure(name)._asdict().items():
    tolerance = 1e-4 if 'angle' in key else 1e-7  # an angle of 0 is an arc cosine near 1
    np.testing.assert_allclose(value, NUMBERS[name][key], rtol=1e-5, atol=tolerance)


def test_the_report_has_every_row_and_the_page_shows_it():
  assert list(NUMBERS) == list(sampling.ROWS), 'run `make pages`'
  page = (estimators_page.DOCS / 'estimators.md').read_text()
  assert all(table in page for table in estimators_page.sampling_tables().values())
  shown = {name.split('`')[1] for name in sampling.METHODS}
  assert set(estimators.CHANGE_SAMPLES) <= shown


def test_what_has_no_bias():
  exact = {name for name, point in NUMBERS.items() if point['angle'] < 1e-4}
  assert exact == {
    'uniform prompts, independent rows',
    'dynamic sampling, at most twice',
    'replay, all groups alike',
    'the same, b = 1, not scaled',
    'dull groups become the newest useful ones',
    'prompts by `spo`, weighted by 1 / (n q)',
    'the same, both stages',
  }


def test_outcomes_have_the_probabilities_of_a_generator():
  def run(random):
    number = int(random.binomial(2, 0.25))
    two = random.choice(3, size=2, replace=False, p=[0.5, 0.3, 0.2])
    return number, *map(int, two)

  found = {}
  for chance, result in outcomes(run):
    found[result] = found.get(result, 0.0) + chance
  np.testing.assert_allclose(sum(found.values()), 1)
  np.testing.assert_allclose(found[1, 2, 0], 2 * 0.25 * 0.75 * 0.2 * 0.5 / 0.8)
  random = np.random.default_rng(0)
  seen = [run(random) for _ in range(4000)]
  for result, chance in found.items():
    assert abs(seen.count(result) / 4000 - chance) < 4 * np.sqrt(chance / 4000)


def test_a_uniform_number_has_cells_and_what_is_left_out_has_chance_zero():
  below = sum(chance for chance, number in outcomes(lambda r: r.random()) if number < 0.35)
  np.testing.assert_allclose(below, 0.35)
  assert [number for _, number in outcomes(lambda r: r.choice(3, p=[0, 1, 0]))] == [1]
  assert [chance for chance, _ in outcomes(lambda r: None)] == [1.0]


def test_rows_without_weight_are_first_with_probability_zero():
  logs = np.log([0.5, 1e-60, 1.5])
  chances = first_chances(lambda noise: np.argmax(logs + noise), 3)
  np.testing.assert_allclose(chances, [0.25, 0, 0.75], atol=1e-9)


def test_groups_of_an_old_run_give_its_own_expectation_of_the_present_gradient():
  params = sampling.setting().params
  log_p = lambda p: enumerable.logp(sampling.POLICY, p).sum(axis=1)
  old, right = np.exp(log_p(params / 2)).reshape(sampling.PROMPTS, -1), sampling.REWARDS
  gap = right.reshape(old.shape) - (old * right.reshape(old.shape)).sum(axis=1, keepdims=True)
  each = np.asarray(jax.jacrev(log_p)(params)).reshape(*old.shape, -1)
  expected = np.einsum('xs,xs,xsk->k', old, gap, each) / sampling.PROMPTS
  found = sampling.with_old_runs(sampling.base()).mean
  plain = sampling.plain(sampling.base()).mean
  np.testing.assert_allclose(found, (plain + expected) / 2, atol=1e-9)


def test_weights_by_returns_are_exponential():
  p = sampling.RATES
  weights = np.exp((p - p.min()) / np.ptp(p) / 0.1)
  np.testing.assert_allclose(sampling.by_returns(), weights / weights.sum(), rtol=1e-6)


def test_thompson_sampling_by_quadrature_is_what_draws_show():
  laws = [sampling.scipy.stats.beta(*x) for x in ((3, 5), (2, 2), (9, 4))]
  score = lambda x: x * (1 - x) ** 2
  found = best_chances(lambda x, y: score(x) > score(y), laws)
  np.testing.assert_allclose(found.sum(), 1, atol=1e-9)
  random = np.random.default_rng(0)
  drawn = score(np.stack([law.rvs(100_000, random_state=random) for law in laws]))
  seen = np.bincount(drawn.argmax(axis=0), minlength=3) / 100_000
  np.testing.assert_allclose(found, seen, atol=4 * np.sqrt(0.25 / 100_000))


def test_weights_of_categories_and_stages_are_those_of_their_prompts():
  np.testing.assert_allclose(sampling.by_weights('abcd', a=4, b=3, c=2, d=1), [0.4, 0.3, 0.2, 0.1])
  halves = sampling.by_weights('abbb', a=1, b=1)
  np.testing.assert_allclose(halves, [1 / 2, 1 / 6, 1 / 6, 1 / 6])
  np.testing.assert_allclose(sampling.in_stages(0), [0, 0, 0.5, 0.5], atol=1e-9)
  np.testing.assert_allclose(sampling.in_stages(0, 1), 1 / 4)


@pytest.mark.parametrize('right', [(1, 2, 4, 3), (0, 4, 2, 0), (0, 0, 4, 4)])
def test_prompts_are_revisited_by_the_variance_of_their_last_group(right):
  """P(again) is proportional to k (4 - k) of the last group; the new one is any of the other three."""
  variance = np.array(right) * (4 - np.array(right))
  again = variance / variance.sum() if variance.any() else np.full(4, 1 / 4)
  state = {'priority': variance / 16, 'visits': np.ones(4, np.int32)}
  found = sampling.once_more(sampling.curricula.revisit(), state)
  np.testing.assert_allclose(sum(found.values()), 1, rtol=1e-9)
  for pair in itertools.combinations(range(4), 2):
    np.testing.assert_allclose(found.get(pair, 0.0), again[[*pair]].sum() / 3, atol=1e-9)


def test_rows_are_copied_behind_a_reply_by_the_rise_of_their_entropy():
  """The chance of each group of the third prompt, written out: two rows start, each may be copied."""
  law, (a, b) = sampling.branched_law(), sampling.TOKENS[2]
  np.testing.assert_allclose(law.chance.sum(), 1, rtol=1e-9)
  first = np.array([1 - a, 1 - a, a, a])
  second = np.array([0.6, 0.4, 1 - b, b])  # sequences 00, 01, 10, 11
  p = first * second
  rest = second * np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
  copied = np.clip(0.5 + 0.2 * (np.log(first) - np.log(second)) / np.log(2), 0, 1)
  own = {tuple(rows - 8): x for rows, x in zip(law.rows, law.chance) if 8 <= rows[0] < 12}
  for i, j, k, m in itertools.product(range(4), repeat=4):
    c, d = copied[i], copied[j]
    further = c * d * rest[i, k] * rest[j, m] + c * (1 - d) * rest[i, k] * p[m]
    further += (1 - c) * d * rest[j, k] * p[m] + (1 - c) * (1 - d) * p[k] * p[m]
    np.testing.assert_allclose(own.get((i, j, k, m), 0.0), p[i] * p[j] * further / 4, rtol=1e-6)


def test_rows_are_avoided_by_adam_on_the_clipped_ratio_until_the_kl_is_reached():
  """The updates written out, for the last prompt and two rows 1 1, of which each is alike.

  With the logit x of a right token behind what is right, p = sigmoid(x), and r = p / p_before:
  the gradient of the mean of max(r, clip(r, .7, 1.3)) is r (1 - p) / 2, or 0 below r = .7.
  """
  before = np.array(sampling.TOKENS[3])
  logits = np.stack([-np.log(before / (1 - before)) / 2, np.log(before / (1 - before)) / 2], axis=1)
  mean, square, updates = np.zeros((2, 2)), np.zeros((2, 2)), 0
  for step in range(1, 17):
    p = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    ratio = p / before
    gradient = np.where(ratio > 0.7, ratio * (1 - p) / 2, 0)[:, None] * [-1, 1]
    gradient /= max(np.sqrt(np.square(gradient).sum()), 1)
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    scaled = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    logits, updates = logits - 0.1 * scaled, step
    if np.mean(ratio - 1 - np.log(ratio)) > 0.01:
      break
  a, b = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
  assert 2 < updates < 16 and a < before[0] - 0.01
  found = sampling.avoiding(0.1)(3, (3, 3))
  np.testing.assert_allclose(found[2:], [a * (1 - b), a * b], rtol=1e-4)


def test_the_mean_of_the_group_takes_a_part_of_the_reward_for_agreement():
  """With a leave-one-out baseline the weight of agreement is (G - 2) / (G - 1) of what is stated."""
  law = functools.partial(sampling.contrasted, 3, ((0, 1, 2),))
  found = sampling.moments(law(cluster=0.8).law, sampling.base()).mean
  stated = functools.partial(sampling.of_contrast, own=True)
  np.testing.assert_allclose(found, stated(law(cluster=0.4)), atol=1e-9)
  assert np.abs(found - stated(law(cluster=0.8))).max() > 1e-2


def test_the_reward_of_embeddings_is_climbed_by_every_answer():
  """Finite differences of the mean reward of one record with two rows, written out."""
  contrast = sampling.contrasted(2, ((0, 1, 2),))
  found = sampling.of_contrast(contrast, own=False)
  every = np.concatenate([contrast.law.rows, contrast.partners], axis=1)
  cos = lambda i, j: (unit[every[:, i]] * unit[every[:, j]]).sum(axis=1)
  unit = sampling.embeddings()
  reward = 10 * ((cos(0, 2) + cos(1, 2)) / 2 - cos(2, 3) + 0.2 * cos(0, 1))

  def mean(params):
    log_p = np.asarray(enumerable.logp(sampling.POLICY, params)).sum(axis=1)
    return np.exp(log_p)[every].prod(axis=1) @ reward

  params = np.asarray(sampling.setting().params)
  for place in (0, 5, 8, 12, 16):
    step = np.zeros(params.size)
    step[place] = 1e-5
    step = step.reshape(params.shape)
    slope = (mean(params + step) - mean(params - step)) / 2e-5
    np.testing.assert_allclose(found[place], slope, atol=1e-6)


def test_tokens_have_temperatures_by_the_entropies_of_the_group_before():
  """With equal rows in the group before, so that its levels can be written out: two entropies."""
  p = np.array([[a, 0.4, b] for a, b in sampling.TOKENS])  # of a 1, by prompt and prefix
  entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
  law = sampling.groups()
  alike = (law.rows == law.rows[:, :1]).all(axis=1)
  before = np.where(alike, law.chance, 0)
  found = sampling.tempered_chances(before / before.sum())
  expected = np.zeros(len(law.rows))
  for row, chance in zip(law.rows[alike, 0], before[alike] / before.sum()):
    x, first = row // 4, row % 4 // 2
    pair = np.log(np.array([entropy[x, 0], entropy[x, 1 + first]]))
    # The 0.8 quantile of four numbers each is the larger; the others lie below it by the largest gap.
    gap = max(pair) - min(pair)
    h = np.clip((np.log(entropy) - max(pair)) / gap, -1, 0) if gap > 1e-9 else 0 * entropy
    odds = (p / (1 - p)) ** (1 / (1 + 0.05 * h))
    right = odds / (1 + odds)
    each = lambda column, one, right=right: np.where(one, right[:, column], 1 - right[:, column])
    q = np.stack([each(0, s // 2) * each(1 + s // 2, s % 2) for s in range(4)], axis=1).ravel()
    expected += chance * q[law.rows].prod(axis=1) / 4
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_tree_of_two_leaves_is_forked_at_its_least_likely_token():
  """The expected gradient of one tree, written out: A = 2 (r - r') behind the fork.

  A shared first token has the value 0, that of the mean of both leaves.
  """
  parts = sampling.method('treerl')()
  found = sampling.moments(sampling.leaves_law(trained=2, grown=1), parts).mean
  policy, params = sampling.POLICY, sampling.setting().params
  log_p = np.asarray(enumerable.logp(policy, params)).reshape(4, 4, 2)
  slope = jax.jacrev(lambda x: enumerable.logp(policy, x))(params)
  slope = np.asarray(slope).reshape(4, 4, 2, -1)
  expected = np.zeros(params.size)
  for x, s, t in itertools.product(range(4), range(4), range(4)):
    fork = int(log_p[x, s, 1] < log_p[x, s, 0])
    if fork and s // 2 != t // 2:
      continue
    chance = np.exp(log_p[x, s].sum() + log_p[x, t, fork:].sum()) / 4
    gap = 2 * ((s == 3) - (t == 3))
    expected += chance * gap * (slope[x, s, fork:] - slope[x, t, fork:]).sum(axis=0) / 4
  np.testing.assert_allclose(found, expected, atol=1e-7)
