"""Trackers get every row of metrics once, also from a run that resumes, and never end a run."""

import glob
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time

import pytest

from polgrad import build, metrics, overrides, trackers
from polgrad.options import from_text

ABOUT = {
  'config': {'seed': 0, 'order': ['train']},
  'versions': {'jax': '1'},
  'git': {'commit': 'c'},
}


def opened(folder, step: int, **kinds) -> metrics.Writer:
  """The writer of a run that begins or resumes after `step` updates."""
  track = lambda dropped: trackers.Tracking(
    kinds, workdir=str(folder), step=step, about=ABOUT, earlier=dropped
  )
  return metrics.Writer(str(folder), step=step, past=('train',), track=track)


def write(writer: metrics.Writer, steps, **others):
  for step in steps:
    row = {
      'loss': 1 / step,
      'loss/nll': 2.0,
      'evaluation/pass@8': 0.5,
      'kl': math.nan,
      'seconds': 0.1 * step,
    }
    writer.write(step, 'train', row | others)
  writer.close()


def interrupted_and_resumed(folder, tracker, between=lambda: None):
  """Writes steps 1 to 4; resumes after step 2 and writes 3 to 5, where 3 and 4 differ by the clock."""
  write(opened(folder, 0, it=tracker), range(1, 5))
  between()
  write(opened(folder, 2, it=tracker), range(3, 6), seconds=9.0)


def wandb_records(path):
  """The records of a .wandb file, a log in the format of LevelDB after 7 bytes."""
  from wandb.proto import wandb_internal_pb2

  with open(path, 'rb') as f:
    data, at, whole = f.read(), 7, b''
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:  # too little for a header: blocks end with padding
      at += left
      continue
    _, size, kind = struct.unpack('<IHB', data[at : at + 7])
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # a whole record, or the last piece of one
      yield wandb_internal_pb2.Record.FromString(whole)
      whole = b''


def wandb_rows(folder):
  """The metrics in all .wandb files of a folder, in the order of writing, and its runs."""
  found, runs = [], []
  for file in sorted(folder.glob('wandb/offline-run-*/*.wandb'), key=os.path.getmtime):
    for record in wandb_records(file):
      if record.HasField('history'):
        items = record.history.item
        found.append({'/'.join(x.nested_key) or x.key: json.loads(x.value_json) for x in items})
      if record.HasField('run') and record.run.config.update:
        runs.append(record.run)
  return found, runs


def test_wandb_writes_offline_and_a_resumed_run_has_the_same_id(tmp_path):
  folder = tmp_path / 'mine'
  folder.mkdir()
  tracker = trackers.wandb(project='p', mode='offline')

  def rename():  # wandb names its folders by the second
    [made] = folder.glob('wandb/offline-run-*')
    made.rename(f'{made}-first')

  interrupted_and_resumed(folder, tracker, rename)
  run_id = json.loads((folder / 'trackers' / 'it.json').read_text())['id']
  # Another process writes the files, and not always before `finish` returns.
  for _ in range(300):
    found, runs = wandb_rows(folder)
    if len(found) >= 5:
      break
    time.sleep(0.1)
  assert {run.run_id for run in runs} == {run_id} and {run.project for run in runs} == {'p'}
  assert {run.display_name for run in runs} == {'mine'}
  values = {x.key: x.value_json for x in runs[0].config.update}
  assert json.loads(values['config']) == ABOUT['config']
  assert [row['update'] for row in found] == [1, 2, 3, 4, 5]
  assert [row['train/loss'] for row in found] == [1 / n for n in range(1, 6)]
  assert not any('train/kl' in row for row in found)


def test_trackio_writes_a_local_data_base_and_a_resumed_run_has_the_same_name(
  tmp_path, monkeypatch
):
  from trackio import utils
  from trackio.sqlite_storage import SQLiteStorage

  for module in {m for m in sys.modules.values() if getattr(m, 'TRACKIO_DIR', None)} | {utils}:
    monkeypatch.setattr(module, 'TRACKIO_DIR', tmp_path / 'store')
  interrupted_and_resumed(tmp_path, trackers.trackio(project='p'))
  name = json.loads((tmp_path / 'trackers' / 'it.json').read_text())['name']
  assert name.startswith(tmp_path.name)
  [file] = glob.glob(str(tmp_path / 'store' / '*.db'))
  with sqlite3.connect(file) as base:
    found = base.execute('select run_name, step, metrics from metrics order by id').fetchall()
  assert {row[0] for row in found} == {name} and [row[1] for row in found] == [1, 2, 3, 4, 5]
  assert json.loads(found[-1][2])['train/evaluation/pass@8'] == 0.5
  assert SQLiteStorage.get_run_config('p', name)['config'] == ABOUT['config']


def test_mlflow_writes_a_folder_and_a_resumed_run_has_the_same_id(tmp_path):
  import mlflow

  interrupted_and_resumed(tmp_path, trackers.mlflow(experiment='e', run_name='r'))
  run_id = json.loads((tmp_path / 'trackers' / 'it.json').read_text())['id']
  client = mlflow.MlflowClient(tracking_uri=str(tmp_path / 'mlruns'))
  run = client.get_run(run_id)
  assert run.info.run_name == 'r' and run.info.status == 'FINISHED'
  assert run.data.params['config.seed'] == '0' and run.data.params['git.commit'] == 'c'
  history = client.get_metric_history(run_id, 'train/loss')
  assert [(m.step, m.value) for m in history] == [(n, 1 / n) for n in range(1, 6)]
  assert run.data.metrics['train/evaluation.pass_at_8'] == 0.5
  assert [e.name for e in client.search_experiments() if e.name != 'Default'] == ['e']


def test_tensorboard_purges_the_steps_that_are_written_again(tmp_path):
  interrupted_and_resumed(tmp_path, trackers.tensorboard())
  files = glob.glob(str(tmp_path / 'tensorboard' / 'events*'))
  text = b''.join(open(file, 'rb').read() for file in files)  # noqa: SIM115
  # Events 1 to 4, then 3 to 5: what is written again replaces the events of its steps.
  assert text.count(b'train/loss/nll') == 7 and b'train/kl' not in text


def test_tensorboard_does_not_import_pytorch(tmp_path):
  code = (
    'import sys; from polgrad import trackers; '
    f'o = trackers.Opening(workdir={str(tmp_path)!r}, step=0, about={{}}, known={{}}); '
    'trackers.tensorboard().open(o)[0].close(); sys.exit("torch" in sys.modules)'
  )
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


class Memory(trackers.Tracker):
  """Keeps rows in a list; fails when it is told to."""

  module, extra = 'json', ''

  def __init__(self, fails=(), rewrites=False):
    self.rows, self.fails, self.rewrites = [], fails, rewrites

  def open(self, opening):
    if 'open' in self.fails:
      raise ConnectionError('no network')
    own = {'write': self.write, 'close': lambda self: None, 'rewrites': self.rewrites}
    board = type('Kept', (trackers.Board,), own)
    return board(), {}

  def write(self, step, values):
    if 'write' in self.fails:
      raise ConnectionError('no network')
    self.rows.append((step, values))


def test_rows_that_a_resumed_run_makes_differently_are_sent_again(tmp_path):
  memory = Memory()
  write(opened(tmp_path, 0, it=memory), range(1, 4))
  write(opened(tmp_path, 1, it=memory), range(2, 4), loss=7.0)
  assert [step for step, _ in memory.rows] == [1, 2, 3, 2, 3]


def test_a_board_that_rewrites_keeps_the_first_row_of_a_phase_at_the_step_of_the_checkpoint(
  tmp_path,
):
  memory = Memory(rewrites=True)
  for step in (0, 2):
    writer = opened(tmp_path, step, it=memory)
    for at, phase in ((1, 'train'), (2, 'train'), (2, 'next'), (3, 'next')):
      if at > step or phase == 'next':
        writer.write(at, phase, {'loss': 1.0})
    writer.close()
  assert [step for step, _ in memory.rows] == [1, 2, 2, 3, 3]


def test_a_tracker_that_joins_later_gets_the_rows_that_are_written_again(tmp_path):
  write(opened(tmp_path, 0), range(1, 4))
  memory = Memory()
  write(opened(tmp_path, 1, it=memory), range(2, 4))
  assert [step for step, _ in memory.rows] == [2, 3]


def test_a_tracker_that_fails_later_warns_once_and_the_others_go_on(tmp_path, caplog):
  broken, whole = Memory(fails=('write',)), Memory()
  with caplog.at_level('WARNING'):
    write(opened(tmp_path, 0, broken=broken, whole=whole), range(1, 4))
  assert [r.message for r in caplog.records] == [
    'config.trackers.broken: ConnectionError: no network; the run continues without it, and its metrics '
    'are in metrics.jsonl'
  ]
  assert len(whole.rows) == len(metrics.read(str(tmp_path / 'metrics.jsonl'))) == 3


def test_a_tracker_that_cannot_be_opened_stops_a_new_run_but_not_a_resumed_one(tmp_path, caplog):
  broken = Memory(fails=('open',))
  with pytest.raises(RuntimeError, match=r'config\.trackers\.it: ConnectionError: no network'):
    opened(tmp_path, 0, it=broken)
  write(opened(tmp_path, 0, it=Memory()), [1])
  with caplog.at_level('WARNING'):
    write(opened(tmp_path, 1, it=broken), [2])
  assert 'continues without it' in caplog.text
  assert len(metrics.read(str(tmp_path / 'metrics.jsonl'))) == 2


def test_a_missing_library_is_refused_with_its_extra(monkeypatch):
  monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r'config.trackers.w needs wandb.*"polgrad\[track\]"'):
    trackers.check({'w': trackers.wandb()})


def test_the_options_of_a_run_name_trackers_and_flags_change_them():
  text = 'method=grpo,task=addition,model=tiny'
  assert [*from_text(text).trackers] == ['tensorboard']
  assert not from_text(f'{text},smoke').trackers and not from_text(f'{text},trackers=none').trackers
  config = from_text(f'{text},smoke,trackers=wandb+mlflow')
  changes = {
    'config.trackers.wandb.project': 'mine',
    'config.trackers.trackio.name': 'trackio',
    'config.trackers.trackio.space_id': 'me/space',
  }
  config = overrides.apply(config, changes, build.TABLE)
  config.mesh.data = 1
  made = build.build(config).trackers
  assert made['wandb'].project == 'mine' and made['trackio'].space_id == 'me/space'
  assert [*made] == ['mlflow', 'trackio', 'wandb']
  with pytest.raises(ValueError, match=r"option trackers: unknown 'wand'; did you mean"):
    from_text(f'{text},trackers=wand')
  config.trackers.wandb.mode = 'sometimes'
  with pytest.raises(ValueError, match=r"config\.trackers\.wandb\.mode.*\['offline', 'online'\]"):
    build.build(config)
