"""The preference report says what the methods do, and its page says what its numbers say."""

import json

import jax
import numpy as np
import pytest

from benchmarks import preference_world as world
from benchmarks import preferences, preferences_page


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='module')
def numbers() -> dict:
  return json.loads(preferences_page.NUMBERS.read_text())


def test_every_preference_method_is_in_the_report_or_left_out_for_a_reason(numbers):
  assert sorted(numbers) == preferences.all_names(), 'run `make pages`'


def test_methods_that_take_the_best_and_the_worst_are_in_the_report_as_those_of_two_samples(
  numbers,
):
  assert {'inpo', 'iterative_dpo', 'async_online_dpo'} <= numbers.keys()
  assert 'chooses the rows' in preferences.left_out('raft')  # which takes one row of two


def test_the_page_is_that_of_the_numbers(numbers, monkeypatch, tmp_path):
  written = (preferences_page.DOCS / 'preferences.md').read_text()
  monkeypatch.setattr(preferences_page, 'DOCS', tmp_path)
  monkeypatch.setattr(preferences_page, 'NUMBERS', tmp_path / 'preferences.json')
  preferences_page.write(numbers, left_out=preferences.reasons())
  assert (tmp_path / 'preferences.md').read_text() == written, 'run `make pages`'


@pytest.mark.parametrize(
  ('name', 'kind', 'data'), [('ipo', 'game', 'on_policy'), ('dpo', 'bradley_terry', 'partial')]
)
def test_the_report_is_what_the_methods_do(name, kind, data, numbers, x64):
  kinds = {x.name: x for x in (world.bradley_terry(), world.game())}
  sources = {x.name: x for x in world.sources()}
  method = preferences.load(name)
  field = preferences.make_field(method)
  found = preferences.measure(method, field, kinds[kind], sources[data])._asdict()
  for key, value in numbers[name][kind][data].items():
    if key not in ('speed', 'tilt', 'nash', 'response') and not key.endswith('temperature'):
      np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-7)
  assert preferences_page.verdict(found) == preferences_page.verdict(numbers[name][kind][data])


def verdicts(numbers, name, kind) -> list[str]:
  return [preferences_page.verdict(numbers[name][kind][data]) for data in preferences_page.DATA]


def test_dpo_ends_at_the_tilted_policy_whoever_sampled_the_bradley_terry_labels(numbers):
  assert verdicts(numbers, 'dpo', 'bradley_terry') == [f'tilt {world.TEMPERATURE:.2f}'] * 4


def test_ipo_ends_at_the_best_response_to_whoever_sampled_and_therefore_depends_on_it(numbers):
  for kind in ('bradley_terry', 'game'):
    assert verdicts(numbers, 'ipo', kind)[1:] == [f'response {world.TEMPERATURE:.2f}'] * 3
  kls = [numbers['ipo']['game'][data]['kl'] for data in ('reference', 'other')]
  assert abs(kls[0] - kls[1]) > 0.01


def test_from_own_samples_the_squared_loss_finds_the_nash_policy_and_the_logistic_one_does_not(
  numbers,
):
  assert verdicts(numbers, 'ipo', 'game')[0] == f'Nash {world.TEMPERATURE:.2f}'
  assert numbers['online_dpo']['game']['on_policy']['nash'] > 1e-3
  assert numbers['online_dpo']['bradley_terry']['on_policy']['tilt'] < preferences_page.EXACT


def test_tdpo_tilts_each_token_by_what_it_is_worth_under_the_reference(numbers, x64):
  """reference(token) exp(E_reference[r | token] / T) / Z after each prefix; the data does not matter."""
  tokens, prefixes = np.asarray(world.POLICY.tokens), np.asarray(world.POLICY.prefixes)
  there, reference = np.asarray(world.POLICY.mask), world.probabilities(world.reference())
  logits = world.reference().copy()
  for prefix, token in np.ndindex(logits.shape):
    rows = (there & (prefixes == prefix) & (tokens == token)).any(axis=1)
    worth = reference[rows] @ world.REWARDS[rows] / reference[rows].sum()
    logits[prefix, token] += worth / world.TEMPERATURE
  pi = world.probabilities(logits)
  wanted = {
    'kl': pi @ np.log(pi / reference),
    'win_rate': pi @ world.bradley_terry().wins @ reference,
    'largest': pi.max(),
  }
  for data in ('on_policy', 'reference', 'other'):
    found = numbers['tdpo']['bradley_terry'][data]
    for name, value in wanted.items():
      assert found[name] == pytest.approx(value, abs=1e-9), (data, name)


def test_cream_ends_at_one_sequence_whatever_is_preferred(numbers, x64):
  """At the one of the largest mean log-probability under the reference, which is ahead at the start."""
  length = np.asarray(world.POLICY.mask).sum(axis=1)
  log_reference = np.log(world.probabilities(world.reference()))
  first = np.argmax(log_reference / length)
  assert first != np.argmax(log_reference)
  for kind in ('bradley_terry', 'game'):
    assert verdicts(numbers, 'cream', kind) == ['one'] * 4
    for data in preferences_page.DATA:
      assert numbers['cream'][kind][data]['kl'] == pytest.approx(-log_reference[first], abs=1e-3)


def test_the_mean_square_of_margins_is_four_kls_near_the_reference_alone(x64):
  """What GPO says of its regulariser; pairs are from the reference."""
  reference = world.probabilities(world.reference())
  move = np.random.default_rng(0).normal(size=world.reference().shape)

  def ratio(size: float) -> float:
    """E[h^2] / 4 over KL(pi, reference)."""
    pi = world.probabilities(world.reference() + size * move)
    gain = np.log(pi / reference)
    squares = reference @ np.square(gain[:, None] - gain) @ reference
    return squares / 4 / (pi @ gain)

  errors = [abs(ratio(size) - 1) for size in (0.02, 0.01)]
  assert errors[1] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.05)
  assert ratio(10.0) > 5


def test_the_likelihood_of_chosen_answers_falls_under_dpo_and_rejected_ones_fall_more(numbers):
  found = numbers['dpo']['bradley_terry']['reference']
  assert found['rejected'] < found['chosen'] < 0


def test_an_online_method_has_the_fixed_point_of_its_loss(numbers):
  """The verdicts of pairs are drawn in the same way, so online DPO and DPO have one field."""
  for data in preferences_page.DATA:
    for key in ('tilt', 'kl'):
      found = (numbers[name]['bradley_terry'][data][key] for name in ('dpo', 'online_dpo'))
      np.testing.assert_allclose(*found, rtol=0, atol=1e-6)


def test_a_game_has_no_reward_and_a_reward_gives_no_cycle():
  wins = world.game().wins
  np.testing.assert_allclose(wins + wins.T, np.ones_like(wins), rtol=0, atol=1e-12)
  assert min(wins[1, 4], wins[4, 6], wins[6, 1]) > 0.9
  log_odds = np.log(world.bradley_terry().wins / world.bradley_terry().wins.T)
  np.testing.assert_allclose(log_odds[1, 4] + log_odds[4, 6] + log_odds[6, 1], 0, atol=1e-12)


def test_the_nearest_tilt_of_a_tilted_policy_is_itself():
  reference = world.probabilities(world.reference())
  tilted = reference * np.exp(world.REWARDS / 0.4)
  every = np.ones(world.SIZE, bool)
  distance, temperature = preferences.nearest(tilted / tilted.sum(), world.REWARDS, every)
  assert distance < preferences_page.EXACT
  np.testing.assert_allclose(temperature, 0.4, rtol=1e-5)
