"""What a checkpoint remembers of a run besides arrays."""

import json
import math

import jax.numpy as jnp
import pytest

from polgrad import checkpoint
from polgrad.progress import BEST, Progress


def test_the_best_value_is_the_first_of_equal_ones_and_always_finite():
  run = Progress()
  values = (math.nan, 1.0, 2.0, 2.0, math.nan, 3.0, math.inf)
  found = [run.improved(x, step) for step, x in enumerate(values)]
  assert found == [False, True, True, False, False, True, False]
  assert (run.best, run.best_step, run.waited) == (3.0, 5, 1)
  run = Progress(best_is='min')
  found = [run.improved(x, step) for step, x in enumerate((4.0, 4.0, -4.0, -math.inf))]
  assert found == [True, False, True, False] and run.best_step == 2


def test_another_metric_or_a_lost_checkpoint_begins_anew():
  run = Progress(tokens=7, metric='a', best=1.0, best_step=3, waited=2)
  run.follow('a', 'max', [3, 4])
  assert run.best == 1.0 and run.waited == 2 and run.measured
  run.follow('a', 'max', [4])
  assert run.best is None and run.waited == 2
  run.follow('b', 'max', [4])
  assert run.waited == 0 and run.tokens == 7 and not run.measured
  run.improved(1.0, 4)
  run.follow('b', 'min', [4])
  assert run.best is None and run.best_is == 'min'


def test_it_is_read_from_the_text_of_a_checkpoint_or_of_an_older_one():
  run, other = Progress(tokens=5, metric='a', best=0.1, best_step=2, waited=1), Progress(tokens=9)
  other.read({'progress': run.to_json() | {'later': 1}})
  assert other == run
  other.read({})
  assert other == Progress()


def test_a_plateau_is_a_mean_that_no_longer_rises():
  run = Progress()
  found = []
  for value in (0.0, 1.0, 1.0, 2.0, math.nan, 1.5, 1.5, 9.0):
    run.note('expert', value, 4)
    found.append(run.on_plateau('expert', 2))
  # (0, 1) then (1, 2); (1, 1) then (2, 1.5); (1, 2) then (1.5, 1.5); (2, 1.5) then (1.5, 9).
  assert found == [False, False, False, False, False, False, True, False]
  assert run.recent == (2.0, 1.5, 1.5, 9.0)
  other = Progress()
  other.read({'progress': json.loads(json.dumps(run.to_json()))})
  assert other == run
  run.recent = (1.0, 1.0)
  assert run.on_plateau('expert', 1) and not run.on_plateau('expert', 0)
  assert not run.on_plateau('train', 1)  # another phase has seen nothing
  run.note('train', 5.0, 4)
  assert run.recent == (5.0,)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
  run = Progress()
  checkpoints = checkpoint.manager(str(tmp_path), keep=2, best=lambda: run.best_step)
  with pytest.raises(FileNotFoundError, match='no whole checkpoint'):
    checkpoint.numbered(checkpoints, 'here', BEST)
  for step, value in enumerate((0.0, 3.0, 2.0, 1.0, 1.0)):
    run.improved(value, step)
    trees = {'params': {'w': jnp.ones(2)}, 'rest': {'n': jnp.ones(1)}}
    checkpoint.save(checkpoints, step, trees, {'progress': run.to_json()})
  checkpoints.wait_until_finished()
  assert sorted(checkpoints.all_steps()) == [1, 3, 4]
  assert checkpoint.numbered(checkpoints, 'here', BEST) == 1
  checkpoint.save(checkpoints, 5, trees, {'progress': Progress().to_json()})
  checkpoints.wait_until_finished()
  with pytest.raises(FileNotFoundError, match=r'no best checkpoint in here: .*keep_best'):
    checkpoint.numbered(checkpoints, 'here', BEST)
  checkpoints.close()


def test_a_checkpoint_of_a_version_whose_state_had_fewer_empty_fields_is_read(tmp_path):
  checkpoints = checkpoint.manager(str(tmp_path))
  stored = {'n': jnp.arange(3.0), 'old': (), 'memory': (jnp.ones(1),)}
  checkpoint.save(checkpoints, 1, {'params': {'w': jnp.ones(2)}, 'rest': stored}, {})
  checkpoints.wait_until_finished()
  like = {'n': jnp.zeros(3), 'memory': (jnp.zeros(1),), 'new': {}, 'newer': ()}
  found = checkpoint.restore(checkpoints, 1, 'rest', like)
  assert found['n'].tolist() == [0, 1, 2] and found['memory'][0] == 1
  assert (found['new'], found['newer']) == ({}, ())
  with pytest.raises(ValueError, match=r"rest of checkpoint 1 .*: it lacks \['new/a'\]"):
    checkpoint.restore(checkpoints, 1, 'rest', like | {'new': {'a': jnp.zeros(1)}})
  checkpoints.close()
