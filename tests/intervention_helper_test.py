"""The parts of experiments/intervention_helper.py, with answers of known probabilities for models."""

import functools
import itertools
import json

import numpy as np
import pytest

from experiments import intervention_helper as helper
from polgrad import build, methods
from polgrad.build import check_data

RIGHT = {1: (0.95, 0.95), 2: (0.3, 0.9)}  # digits -> the policy's answer, the helper's


def digits(text):
  """Of the numbers of each sum of a state."""
  return tuple(len(one.partition('+')[0]) for one in text.rstrip('=').split(','))


@functools.cache
def chances(first, *rest):
  """p(s, -) and p(s, ?) if a coin decides all later turns, from the definition."""
  later = np.prod([np.mean(RIGHT[d]) for d in rest])
  return [RIGHT[first][0] * later, RIGHT[first][1] * later]


def predict(texts):
  return np.array([chances(*digits(text)) for text in texts]).reshape(-1, 2)


def acting(seed):
  random = np.random.default_rng(seed)

  def act(questions, asked, turn):
    del turn
    right = [random.random() < RIGHT[digits(q)[0]][int(ask)] for q, ask in zip(questions, asked)]
    return [str(sum(map(int, q[:-1].split('+')))) if ok else 'x' for q, ok in zip(questions, right)]

  return act


def records(first, count):
  return [helper.worksheet(first + i) for i in range(count)]


def test_the_first_wrong_answer_ends_a_worksheet():
  sheets = [
    {'prompt': '1+2,30+4,5+5,6+1=', 'answers': ['3', '34', '10', '7']},
    {'prompt': '2+2,3+4,5+6,7+8=', 'answers': ['4', '7', '11', '15']},
  ]
  asked_for = []

  def act(questions, asked, turn):
    asked_for.append((turn, list(questions), asked.tolist()))
    return ['0' if q == '30+4=' else str(sum(map(int, q[:-1].split('+')))) for q in questions]

  played = helper.play(sheets, lambda texts: [',' not in t or t[0] == '3' for t in texts], act)
  assert played.texts[0] == ['1+2,30+4,5+5,6+1=', '30+4,5+5,6+1=']
  assert played.texts[1][-1] == '7+8=' and len(played.texts[1]) == 4
  assert played.solved.tolist() == [False, True]
  assert played.asked.tolist() == [[False, True, False, False], [False, True, False, True]]
  assert asked_for[1] == (1, ['30+4=', '3+4='], [True, True]) and asked_for[2][1] == ['5+6=']
  assert helper.outcomes(played)[1] == {'prompt': '30+4,5+5,6+1=', 'answer': '?', 'solved': 0.0}
  assert helper.measured(played) == {'requests': 1.5, 'solved': 0.5}


def test_episodes_become_rows_of_states():
  played = helper.Played(
    [['a', 'b'], ['c', 'd', 'e', 'f']], np.eye(2, helper.TURNS, dtype=bool), np.array([False, True])
  )
  groups = [np.array(one) for one in ([3, 4], [5, 6], [7], [8])]
  rollouts = helper.numbered(played, groups)
  begin, failed, solved = helper.BEGIN, helper.FAILED, helper.SOLVED
  assert rollouts.states.tolist() == [
    [begin, 3, 5, failed, failed, failed],
    [begin, 4, 6, 7, 8, solved],
  ]
  assert not rollouts.asked[:, 0].any() and rollouts.asked[:, 1:].tolist() == played.asked.tolist()


def test_groups_are_quantiles_of_level_and_gain():
  random = np.random.default_rng(0)
  predicted = [random.random((4000, 2)) for _ in range(3)] + [np.zeros((0, 2))]
  grouping = helper.grouped(predicted)
  found = grouping(1, predicted[1]) - helper.FIRST
  assert (np.bincount(found, minlength=helper.LEVELS**2) == 4000 // helper.LEVELS**2).all()
  level, gain = predicted[1].mean(axis=1), predicted[1][:, 1] - predicted[1][:, 0]
  for a, b in itertools.pairwise(range(helper.LEVELS)):
    assert level[found // helper.LEVELS == a].max() < level[found // helper.LEVELS == b].min()
    assert gain[found == a].max() < gain[found == b].min()
  assert len(grouping(3, np.zeros((0, 2)))) == 0


def best(price):
  """V(s) = max{alone, helped - price} over the sums that are left, as (success, requests)."""
  sums = {(): (1.0, 0.0)}
  for length in range(1, helper.TURNS + 1):
    for rest in itertools.product((1, 2), repeat=length):
      solved, requests = sums[rest[1:]]
      alone, helped = RIGHT[rest[0]]
      ways = [(alone * solved, alone * requests), (helped * solved, 1 + helped * requests)]
      sums[rest] = max(ways, key=lambda way: way[0] - price * way[1])
  whole = [sums[rest] for rest in itertools.product((1, 2), repeat=helper.TURNS)]
  return np.mean(whole, axis=0)


@pytest.fixture(scope='module')
def seen():
  return helper.play(records(0, 5000), helper.coin(0.5, 0), acting(1))


@functools.cache
def sheets():
  return records(10**6, 1500)


@pytest.mark.parametrize('budget', [0.0, 0.6, 4.0])
def test_the_plan_is_near_the_best_one_and_keeps_to_the_budget(seen, budget):
  plan = helper.planned(seen, predict, budget)
  played = helper.measured(helper.play(sheets(), plan.decide, acting(2)))
  solved, requests = best(plan.price)
  assert plan.requests <= budget + 1e-9
  assert played['requests'] == pytest.approx(plan.requests, abs=0.1)
  assert played['solved'] == pytest.approx(plan.solved, abs=0.05)
  # At its price the plan is worth as much as the best of all that see the sums.
  worth = played['solved'] - plan.price * played['requests']
  assert worth == pytest.approx(solved - plan.price * requests, abs=0.05)


def test_the_plan_solves_more_than_a_coin_with_as_many_requests(seen):
  plan = helper.planned(seen, predict, 1.0)
  played = helper.measured(helper.play(sheets(), plan.decide, acting(2)))
  coin = helper.coin(0.45, 3)
  other = helper.measured(helper.play(sheets(), coin, acting(2)))
  assert other['requests'] > played['requests'] and other['solved'] < played['solved'] - 0.05


def test_a_decision_model_learns_the_plan_and_is_compared_with_the_others(tmp_path, monkeypatch):
  """Models are replaced by functions: the policy knows sums of one digit, the helper all."""

  def write(params, texts, noise):
    del noise
    known = [params == 'helper' or digits(text)[0] == 1 for text in texts]
    return [str(sum(map(int, t[:-1].split('+')))) if ok else '' for t, ok in zip(texts, known)]

  def choose(params, texts, noise):
    assert params == 'decision' and noise == (0, 0)
    return ['?' if digits(text)[0] == 2 else '-' for text in texts]

  models = [helper.Model(None, name) for name in ('policy', 'helper', 'decision')]
  monkeypatch.setattr(helper, 'trained', lambda config, folder, begin: models[2])
  study = helper.Study(tmp_path, 0, *models[:2], write, choose)
  teacher = lambda texts: np.array([digits(text)[0] == 2 for text in texts])
  seen = helper.play(study.records(0, 50), teacher, study.act(0))
  decide = helper.imitated(study, seen, teacher, tmp_path / 'budget', helper.SMOKE)
  lines = (tmp_path / 'budget/labels.jsonl').read_text().splitlines()
  assert len(lines) == 50 * helper.TURNS
  for line in map(json.loads, lines):
    assert line['answer'] == ('?' if digits(line['prompt'])[0] == 2 else '-')

  plan = helper.Planned(0.1, 2.0, 1.0, teacher)
  found = helper.compared(study, plan, decide, helper.SMOKE)
  assert found['expected'] == {'price': 0.1, 'requests': 2.0, 'solved': 1.0}
  assert found['model'] == found['plan'] and found['model']['solved'] == 1
  assert found['never asks']['requests'] == 0 and found['never asks']['solved'] < 0.3
  assert found['always asks'] == {'requests': 4.0, 'solved': 1.0}
  assert found['coin']['solved'] < 0.95 and found['coin']['requests'] > 1


def test_what_the_models_read_fits_them(tmp_path):
  """Every configuration is one that trains, with the longest state there is."""
  longest = ','.join(['99+99'] * helper.TURNS) + '='
  lines = [{'prompt': longest, 'answer': who, 'solved': 1.0} for who in (helper.ASK, helper.ALONE)]
  task = helper.read_states(tmp_path / 'states.jsonl', lines)
  for method in (methods.reward_regression(target_field='solved'), methods.sft()):
    experiment = build.build(helper.configuration(task, method, 2, 0))
    assert not check_data(experiment)


def test_the_table_has_the_mean_and_the_range_of_the_seeds():
  way = lambda solved: {'requests': 1.0, 'solved': solved}
  lines = [
    {'seed': seed, 'budget': 1.0, **{name: way(0.25 * (1 + seed)) for name in helper.ROWS}}
    for seed in (0, 1)
  ]
  rows = helper.table(lines).splitlines()[2:]
  assert len(rows) == len(helper.ROWS)
  assert rows[2] == '| 1 | decision model | 1.00 (1.00 to 1.00) | 0.38 (0.25 to 0.50) |'


def test_the_page_has_the_table_of_the_recorded_results():
  page = (helper.RESULTS.parent / 'games.md').read_text()
  assert helper.table(helper.read()) in page
