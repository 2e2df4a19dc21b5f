"""Sampling beside training gives the numbers of the same lag without it, also on other devices."""

import shutil
import threading

import jax
import numpy as np
import pytest

from polgrad import build, credit, curricula, phases, sharding, train
from polgrad.collect import Rollouts, replay, rollout_steps
from polgrad.options import from_text
from polgrad.registry import part
from polgrad.types import Batch
from tests.runs import method_of
from tests.train_test import config, equal, rows

pytestmark = pytest.mark.usefixtures('compiled_once', 'undrawn')


def lagging(overlap: bool = True, **changes):
  made = config()
  made.phases.train.curriculum = part(curricula.vade, term='short')
  rdd = method_of('rdd')  # a network remembers too
  with made.unlocked():
    made.phases.train.networks = dict(rdd.networks)
    made.phases.train.credit = part(
      credit.shaped, credit=made.phases.train.credit, reward=rdd.credit.reward
    )
  made.phases.train.collect.update(lag=1, replay=1, replay_fraction=0.5, overlap=overlap, **changes)
  return made


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """(folder, state) of a run with this lag that samples and trains in turns."""
  folder = str(tmp_path_factory.mktemp('alone'))
  return folder, train.run(lagging(overlap=False), folder)


def test_an_overlapped_run_is_the_run_with_this_lag_bit_for_bit_and_resumes(alone, tmp_path):
  expected, state = alone
  whole, broken = str(tmp_path / 'whole'), str(tmp_path / 'broken')
  equal(train.run(lagging(), whole), state)
  size = sum(x.nbytes for x in jax.tree.leaves(state.params))
  made = rows(whole)
  sent = [row.pop('bytes/transfer') for row in made if 'staleness' in row]
  assert sent == [size] * 4 and made == rows(expected)
  assert [row['staleness'] for row in rows(whole) if 'staleness' in row] == [0, 1, 1.5, 1.5]
  assert int(state.collect_state.count) == 4
  shutil.copytree(whole, broken)
  shutil.rmtree(tmp_path / 'broken/checkpoints/19')  # the one before is in mid-phase
  equal(train.run(lagging(), broken), state)
  assert rows(broken) == rows(whole)
  learned = [row['bonus/loss'] for row in rows(whole) if 'bonus/loss' in row]
  assert len(learned) == 4 and int(state.networks['bonus']['skipped']) == 0


def test_other_devices_sample_the_same_rows(alone, tmp_path):
  made = lagging()
  made.sampler_mesh = part(sharding.beside, data=2)
  assert list(build.build(made).sampled_on.devices.flat) == jax.devices()[1:3]
  run = train.run(made, str(tmp_path))
  for name in ('reward', 'length', 'loss', 'grad_norm'):
    got, expected = ([row[name] for row in rows(x) if name in row] for x in (tmp_path, alone[0]))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=name)
  assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(run.params))


def test_rows_are_judged_during_the_update_of_their_step(monkeypatch, tmp_path):
  """In turns, rows that wait for the update of their step would wait in vain."""
  updating, arrived = threading.Semaphore(0), []
  score, update = rollout_steps.RolloutSteps.score, phases.PhaseRun.update_all

  def scored(self, rows, records, state, draw, step):
    if step:
      arrived.append(updating.acquire(timeout=60))
    return score(self, rows, records, state, draw, step)

  def updated(self, state, batch, step, further):
    if self.name == 'train' and step:
      updating.release()
    return update(self, state, batch, step, further)

  monkeypatch.setattr(rollout_steps.RolloutSteps, 'score', scored)
  monkeypatch.setattr(phases.PhaseRun, 'update_all', updated)
  made = lagging()
  made.phases.train.steps = 3
  train.run(made, str(tmp_path))
  assert arrived == [True] * 2


def test_what_is_recalled_does_not_depend_on_whether_the_newest_batch_is_stored():
  """For rings that are not full, just full, and overwritten."""
  batch = lambda n: Batch(
    tokens=np.full((4, 2), n),
    segment_ids=np.ones((4, 2), np.int32),
    mask=np.ones((4, 2), bool),
    rewards=np.arange(4.0) + n,
    group_ids=np.arange(4) // 2,
  )
  for lag, replayed in [(1, 0), (1, 2), (3, 1)]:
    ring = replay.empty(batch(0), capacity=lag + replayed + 1)
    settings = dict(lag=lag, choice=replay.Choice(0.5 if replayed else 0), rows_per_prompt=2)
    for n in range(9):
      seeded = [np.random.default_rng(n) for _ in range(2)]
      early = replay.recalled(ring, **settings, random=seeded[0], coming=1) if n else None
      ring = replay.stored(ring, batch(n))
      late = replay.recalled(ring, **settings, random=seeded[1])
      if n:
        jax.tree.map(np.testing.assert_array_equal, early, late)
        assert replayed or early.tokens.max() == max(n - lag, 0)


def test_what_cannot_overlap_is_refused():
  with pytest.raises(ValueError, match='lag of at least 1'):
    Rollouts(overlap=True)
  made = lagging()
  made.sampler_mesh = part(sharding.beside, data=9)
  with pytest.raises(ValueError, match='data=9 does not fit 7 devices'):
    build.build(made)
  made.sampler_mesh = part(sharding.beside, data=7)
  with pytest.raises(ValueError, match='records, which do not divide by its 7 devices'):
    build.build(made)


@pytest.mark.parametrize(
  ('changed', 'said'),
  [
    ({'mesh.data': 4}, r'config.mesh, config.sampler_mesh: .* 4 of the 8 devices of its 2 proc'),
    ({'mesh.data': 8}, 'config.phases.train.collect.overlap: .*--config.sampler_mesh.name='),
  ],
)
def test_devices_of_several_processes_that_are_idle_or_shared_are_refused(
  monkeypatch, changed, said
):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  made = lagging(overlap=True)
  made.update_from_flattened_dict(changed)
  with pytest.raises(ValueError, match=said):
    build.build(made)


def test_devices_for_sampling_that_no_phase_uses_are_refused():
  made = from_text('method=sft,task=addition,model=tiny')
  made.mesh.data = 1
  made.sampler_mesh = part(sharding.beside, data=2)
  with pytest.raises(ValueError, match='no phase samples rollouts'):
    build.build(made)
