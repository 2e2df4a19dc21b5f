"""The curves of runs: what belongs to the family, each phase by itself, several runs over each other."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from polgrad import metrics, report


def run(folder, kind: str, steps=70) -> str:
  """A folder with the metrics of a supervised phase and one of another kind."""
  values = {
    'preferences': {'margin': 0.1, 'accuracy': 0.5, 'evaluation/pairs/accuracy': 0.6},
    'rollouts': {'reward': 0.1, 'length': 3.0, 'kept_positive': 1.0, 'kept_negative': 0.9},
    'completions': {'evaluation/demonstrations/loss': 1.0},
  }[kind]
  rows = [{'step': i, 'phase': 'warm_start', 'loss': 1 / i, 'entropy': 2.0} for i in (1, 2)]
  rows += [{'step': 2, 'phase': 'train', 'evaluation/greedy': 0.0}]
  rows += [{'step': 2 + 4 * i, 'phase': 'train', 'loss': i, **values} for i in range(1, steps)]
  folder.mkdir()
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text + '{"step": 99, "cut off')  # a run that was killed
  return str(folder)


@pytest.mark.parametrize(
  ('kind', 'titles'),
  [
    ('preferences', ['pairs ranked right', 'margin', 'loss', 'held-out problems solved']),
    (
      'rollouts',
      ['held-out problems solved', 'reward', 'length, tokens', 'tokens with a gradient', 'loss'],
    ),
    ('completions', ['loss', 'held-out problems solved']),
  ],
)
def test_a_phase_shows_what_belongs_to_its_family_over_its_own_updates(kind, titles, tmp_path):
  found = report.phases(metrics.read(run(tmp_path / 'a', kind) + '/metrics.jsonl'))
  assert report.family(found['warm_start']) == 'completions'
  assert [p.title for p, _ in report.plots([found['warm_start']])] == ['loss', 'entropy, nats']
  shown = report.plots([found['train']])
  assert report.family(found['train']) == kind and [p.title for p, _ in shown] == titles
  if kind == 'preferences':
    assert shown[0][1] == ['accuracy', 'evaluation/pairs/accuracy']
  updates, values = report.curve(found['train'], 'loss')
  np.testing.assert_array_equal(updates[:3], [4, 8, 12])
  np.testing.assert_array_equal(values[:3], [1, 2, 3])


def test_one_run_is_drawn_into_its_folder_and_several_into_a_file(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  one, other = run(tmp_path / 'a', 'rollouts'), run(tmp_path / 'b', 'preferences', steps=3)
  flags.FLAGS.mark_as_parsed()
  report.main(['report', other])
  with flagsaver.flagsaver(out='both.png'):
    report.main(['report', one, other])
  for path in ('b/report.png', 'both.png'):
    assert (tmp_path / path).read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  assert capsys.readouterr().out.splitlines()[-1] == 'wrote both.png'
  with pytest.raises(SystemExit):
    report.main(['report', str(tmp_path / 'nowhere')])
  assert 'nowhere: expected the folder of a run' in capsys.readouterr().err


def test_runs_are_named_by_as_much_of_their_folders_as_differs():
  assert report.labels(['x/a', 'x/b/']) == ['a', 'b']
  assert report.labels(['x/a', 'y/a']) == ['x/a', 'y/a']
  with pytest.raises(ValueError, match='the same folder twice'):
    report.labels(['x/a', 'x/../x/a'])


def test_a_running_mean_lies_at_the_middle_of_its_points_and_a_short_curve_has_none():
  x = np.arange(report.DENSE + 30)
  updates, values = report.running_mean(x, 2.0 * x)
  np.testing.assert_allclose(values, 2.0 * updates, rtol=0, atol=1e-9)  # of 3 points, the second
  assert len(updates) == len(x) - 2
  assert not len(report.running_mean(x[: report.DENSE], x[: report.DENSE])[0])


def test_a_run_without_metrics_gets_a_picture_that_says_so(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('')
  assert report.draw([str(tmp_path)]) == str(tmp_path / 'report.png')
