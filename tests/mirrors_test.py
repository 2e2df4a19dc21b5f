"""The folder of a run in a bucket: what is copied and when, and two runs that want the same one."""

import os

import pytest
from absl import flags
from absl.testing import flagsaver

from polgrad import checkpoint, mirrors, report, row_files, workdirs
from polgrad.view import runs
from tests import buckets

FOLDER = 'gs://bucket/runs/a'


@pytest.fixture
def place(tmp_path, monkeypatch):
  """The folder of this machine in which the bucket keeps the files of `FOLDER`."""
  buckets.use(monkeypatch, tmp_path)
  return tmp_path / 'runs' / 'a'


@pytest.fixture
def filled(place):
  """A run that has ended, with a checkpoint."""
  (place / 'rollouts').mkdir(parents=True)
  (place / 'checkpoints' / '3').mkdir(parents=True)
  (place / 'checkpoints' / '3' / 'arrays').write_text('large')
  (place / 'metrics.jsonl').write_text('{"step": 1, "phase": "train", "loss": 0.5}\n')
  (place / 'config.json').write_text('{"seed": 3}')
  return place


def listed(folder):
  return sorted(
    os.path.relpath(os.path.join(top, name), folder)
    for top, _, names in os.walk(folder)
    for name in names
  )


def test_the_run_gets_all_files_but_checkpoints_and_its_name(filled):
  with workdirs.opened(FOLDER, chief=True) as folder:
    assert listed(folder.path) == ['config.json', 'metrics.jsonl']
    assert os.path.basename(folder.path) == 'a' and folder.name == FOLDER


def test_a_new_run_begins_with_an_empty_folder_and_other_processes_write_nothing(place):
  for chief in (True, False):
    with workdirs.opened(FOLDER, chief=chief) as folder:
      assert listed(folder.path) == []
      if chief:
        folder.take()
      open(os.path.join(folder.path, f'{chief}'), 'w').close()
      folder.send()
  assert listed(place) == ['True']


def test_files_that_changed_are_sent_and_those_that_are_gone_are_deleted(filled, monkeypatch):
  sent = []
  send = mirrors.Mirror._send
  monkeypatch.setattr(mirrors.Mirror, '_send', lambda m, name: (sent.append(name), send(m, name)))
  with workdirs.opened(FOLDER, chief=True) as folder:
    folder.take()
    folder.send()
    assert sent == []
    with open(os.path.join(folder.path, 'metrics.jsonl'), 'a') as file:
      file.write('more\n')
    open(os.path.join(folder.path, 'half.tmp'), 'w').close()
    os.remove(os.path.join(folder.path, 'config.json'))
    folder.send()
    assert sent == ['metrics.jsonl']
    assert (filled / 'metrics.jsonl').read_text().endswith('0.5}\nmore\n')
  assert listed(filled) == ['checkpoints/3/arrays', 'metrics.jsonl']


def test_the_later_of_two_runs_has_the_folder_and_the_earlier_one_ends_at_its_save(filled, caplog):
  with workdirs.opened(FOLDER, chief=True) as second:
    with (
      pytest.raises(
        RuntimeError, match=r'gs://bucket/runs/a: another run has taken this folder: .*process'
      ),
      workdirs.opened(FOLDER, chief=True) as first,
    ):
      first.take()
      second.take()
      os.remove(os.path.join(first.path, 'config.json'))
      first.send()
    assert (filled / 'config.json').exists()
    assert f'{FOLDER} was left by' in caplog.text
    second.send()
  assert not (filled / '.owner').exists()


def test_a_run_that_fails_still_sends_what_it_has(place):
  with pytest.raises(ValueError, match='own'), workdirs.opened(FOLDER, chief=True) as folder:
    folder.take()
    open(os.path.join(folder.path, 'metrics.jsonl'), 'w').close()
    raise ValueError('own')
  assert listed(place) == ['metrics.jsonl']


def test_a_run_that_is_refused_writes_nothing(filled):
  before = listed(filled)
  with pytest.raises(ValueError, match='own'), workdirs.opened(FOLDER, chief=True) as folder:
    open(os.path.join(folder.path, 'new'), 'w').close()
    raise ValueError('own')
  assert listed(filled) == before


def test_the_page_and_the_curves_of_a_run_in_a_bucket(filled, capsys):
  [run] = runs.read([FOLDER], runs.Limits())
  assert (run.label, run.workdir, run.config) == ('a', FOLDER, {'seed': 3})
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(out=''):
    report.main(['report', FOLDER])
  assert f'wrote {FOLDER}/report.png' in capsys.readouterr().out
  assert (filled / 'report.png').read_bytes()[:4] == b'\x89PNG'
  with pytest.raises(FileNotFoundError, match='there is no folder gs://bucket/runs/b'):
    runs.read(['gs://bucket/runs/b'], runs.Limits())


def test_a_file_of_rows_is_read_from_a_bucket(filled):
  store = row_files.Store(str(filled), step=0, past=(), limit=2**20)
  store.write_samples('train', 1, [('1+1=', '2', 1.0)])
  stored = row_files.read(f'{FOLDER}/evaluations/train-000001.parquet')
  assert stored.rows[0]['completion'] == '2'


def test_the_checkpoints_of_a_bucket_are_not_put_below_the_current_folder():
  assert str(checkpoint._absolute('gs://bucket/run')) == 'gs://bucket/run'
  assert str(checkpoint._absolute('run')) == os.path.join(os.getcwd(), 'run')
