"""Best-first search over the turns of an environment: its order, its states, and what is learned."""

import dataclasses
import doctest
import types
from typing import ClassVar

import jax
import numpy as np
import pytest

from polgrad import build, collect, learner, phases
from polgrad.collect import best_first
from polgrad.collect.drawn import Drawn
from polgrad.environments import Environment, Step
from polgrad.environments.episodes import Episode
from polgrad.registry import part
from polgrad.types import Batch, turns
from tests.environments import runs_test

pytestmark = pytest.mark.usefixtures('samplers_once')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lock(Environment):
  """Opens after three turns that begin with an even digit; any other turn ends the episode."""

  IN_PROCESS: ClassVar[bool] = True
  max_turns: int = 4

  def reset(self, record, seed):
    return 0

  def step(self, state, text):
    fits = text[:1] in {*'02468'}
    done = not fits or state == 2
    return Step(state + fits, '>', float(fits and state == 2), done)


@pytest.fixture(scope='module')
def searched():
  """What is searched for four prompts, by a model that knows nothing."""
  settings = dict(kind=collect.BestFirst, samples_per_prompt=4, max_new_tokens=16)
  more = dict(expansions=9, at_once=2, alpha=0.5)
  run = build.build(runs_test.config(part(Lock), **settings, **more))
  phase = run.phases['train']
  with jax.set_mesh(run.mesh):
    state = phases.begin(run, 0, None)
    steps = phase.collect.make(phases.context(run, phase, 0)).__self__
    draw = lambda number: phases.Drawer(phase, seed=0, cursor=0)(number)
    drawn, records = steps.sample(state, draw, 0)
    logp = np.asarray(learner.forward(run.policy, state.params, drawn.batch).logp)
    batch, report = steps.score(drawn, records, state, draw, 0)
  return drawn, logp, batch, report


def test_rows_are_episodes_of_the_environment_under_the_policy(searched):
  drawn, logp, batch, report = searched
  rows = drawn.batch
  assert len(rows.tokens) == 16 and not any(name.startswith('search/') for name in batch)
  np.testing.assert_array_equal(rows.group_ids, np.arange(16) // 4)
  np.testing.assert_allclose(rows.behavior_logp[rows.mask], logp[rows.mask], atol=2e-5)
  lock, lengths = Lock(), []
  for row, episode in enumerate(drawn.episodes):
    assert len(turns(rows.mask[row])) == len(episode.turns) == len(episode.rewards)
    state = lock.reset({}, 0)
    for number, text in enumerate(episode.turns):
      answer = lock.step(state, text)
      assert answer.reward == episode.rewards[number]
      state = answer.state
    assert answer.done == episode.done and not episode.states
    lengths.append(len(episode.turns))
    assert batch.rewards[row] == sum(episode.rewards)
  # Three turns in a row are right once in many samples, and four samples of a prompt would find few.
  found = report.metrics
  assert found['search/solved'] >= 0.5 and max(lengths) == 3
  assert found['search/solved'] == np.mean(batch.rewards.reshape(4, 4).max(1) == 1)
  assert 1 < found['search/expanded'] <= 9


def test_each_pair_of_state_and_action_is_learned_once(searched):
  drawn, _, batch, report = searched
  pairs = []
  for row, mask in enumerate(drawn.batch.mask):
    for span in turns(mask):
      seen = drawn.batch.segment_ids[row, : span.stop] > 0
      pair = row // 4, drawn.batch.tokens[row, : span.stop][seen].tobytes()
      assert batch.mask[row, span].all() == (pair not in pairs)
      assert batch.mask[row, span].any() == (pair not in pairs)
      pairs.append(pair)
  assert len({*pairs}) < len(pairs)
  assert report.metrics['search/shared'] == pytest.approx(
    1 - batch.mask.sum() / drawn.batch.mask.sum()
  )


def made(rows, width=8):
  """Drawn rows: (tokens of the path, log-probs of them, reply or None, reward)."""
  tokens, logp = np.zeros((len(rows), width), 'i4'), np.zeros((len(rows), width), 'f4')
  mask = np.zeros((len(rows), width), bool)
  episodes = []
  for i, (path, found, read, reward, state) in enumerate(rows):
    tokens[i, : len(path)], logp[i, : len(path)], mask[i, : len(path)] = path, found, True
    # A path has one token a turn, and one that was read between two turns.
    mask[i, 1 : len(path) : 2] = False
    episodes.append(Episode(rewards=[reward], done=read is None, states=[state]))
  batch = Batch(tokens=tokens, segment_ids=(tokens > 0).astype('i4'), mask=mask, behavior_logp=logp)
  return Drawn(batch, episodes, [one[2] for one in rows])


def test_the_state_with_the_largest_mean_log_likelihood_is_expanded_next():
  settings = types.SimpleNamespace(
    expansions=4, at_once=1, alpha=0.5, solved=0.5, samples_per_prompt=3
  )
  search = best_first.Search(settings, 2)
  rows = [([5], [-2.0], [9], 0.0, 'a'), ([6], [-1.0], [9], 0.0, 'b'), ([6], [-1.0], [9], 0.0, 'c')]
  rows += [
    ([7], [-3.0], None, 1.0, 'd'),
    ([8], [-0.1], [9], 0.0, 'e'),
    ([4], [-0.2], [9], 0.0, 'f'),
  ]
  search.add(made(rows), [0, 0, 0, 1, 1, 1])
  # The third row repeats the second. The second prompt is solved.
  [node] = search.take()
  assert (node.row, node.column, node.priority) == (1, 2, -1.0)
  assert search.batch.tokens[1, :3].tolist() == [6, 9, 0] and not search.batch.mask[1, 1]
  deeper = [
    ([6, 9, 5], [-1.0, 0.0, -2.0], [9], 0.0, 'g'),
    ([6, 9, 4], [-1.0, 0.0, -0.1], [9], 0.0, 'a'),
  ]
  deeper += [([6, 9, 7], [-1.0, 0.0, -1.7], [9], 0.0, 'h')]
  search.add(made(deeper), [0, 0, 0])
  # -2.7 / sqrt 2 is above -2, which is above -3 / sqrt 2; the prompt has been in state 'a' before.
  order = [search.take()[0] for _ in range(2)]
  assert [node.row for node in order] == [8, 0]
  np.testing.assert_allclose([n.priority for n in order], [-2.7 / 2**0.5, -2.0], rtol=1e-6)
  assert search.take() == []  # four states are expanded
  # Solved ones first, then the last drawn; repeated ones last.
  np.testing.assert_array_equal(search.chosen(), [8, 7, 6, 3, 5, 4])
  assert not doctest.testmod(best_first).failed


def test_a_reply_without_room_for_another_turn_opens_no_state():
  batch, columns = best_first.with_replies(
    made([([5, 6, 7], [0.0] * 3, [9, 9], 0.0, 'a'), ([5], [0.0], None, 0.0, 'b')], width=5).batch,
    [[9, 9], None],
  )
  assert columns.tolist() == [-1, -1] and not batch.tokens[:, 3:].any()
