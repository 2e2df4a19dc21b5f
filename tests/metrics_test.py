"""The metrics of a run: what was written is never lost, and any JSON reader reads it."""

import json

import pytest

from polgrad import metrics, whole_files

ROWS = [{'step': i, 'phase': 'train', 'loss': i / 2} for i in range(1, 6)]
TEXT = ''.join(json.dumps(row) + '\n' for row in ROWS)


def reopened(folder, text: bytes, *, step=5, past=('train',)) -> list[dict]:
  """The rows that a run which resumes after `step` updates keeps of a file."""
  (folder / 'metrics.jsonl').write_bytes(text)
  metrics.Writer(str(folder), step=step, past=past).close()
  return metrics.read(str(folder / 'metrics.jsonl'))


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
  assert reopened(tmp_path, TEXT.encode(), step=3) == ROWS[:3]
  assert reopened(tmp_path, TEXT.encode(), past=()) == []


def test_a_last_line_that_a_crash_cut_off_is_dropped(tmp_path):
  assert reopened(tmp_path, TEXT.encode()[:-9]) == ROWS[:-1]
  assert not list(tmp_path.glob('*.damaged*'))


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
  assert reopened(tmp_path, TEXT.encode()[:-1]) == ROWS


@pytest.mark.parametrize(
  'line',
  [
    b'{"step": 3, "pha',
    b'\xff\xfe',
    b'',
    b'[1]',
    b'{"step": 3}',
    b'NULL',
    b'[' * 100_000,
    b'{"step": Infinity, "phase": "a"}',
    b'{"step": 1, "phase": "train", "loss": "abc"}',
  ],
)
def test_a_bad_line_costs_no_other_row_and_the_file_is_kept(line, tmp_path):
  first, second, *rest = TEXT.encode().splitlines(keepends=True)
  bad = first + second + line + b'\n' + b''.join(rest)
  for aside in ('metrics.jsonl.damaged', 'metrics.jsonl.damaged.1'):
    assert reopened(tmp_path, bad) == ROWS
    assert (tmp_path / aside).read_bytes() == bad


def test_numbers_that_json_does_not_have_are_null(tmp_path):
  writer = metrics.Writer(str(tmp_path), step=0, past=())
  writer.write(1, 'train', {'loss': float('nan'), 'kl': float('inf'), 'reward': 1})
  writer.close()
  text = (tmp_path / 'metrics.jsonl').read_text()

  def refuse(name):
    raise ValueError(name)

  row = json.loads(text, parse_constant=refuse)
  assert row == {'step': 1, 'phase': 'train', 'loss': None, 'kl': None, 'reward': 1.0}


def test_a_row_for_which_the_disk_has_no_space_is_an_error_that_names_the_file(tmp_path):
  writer = metrics.Writer(str(tmp_path), step=0, past=())
  writer._file.close()
  writer._file = open('/dev/full', 'a', buffering=1)  # noqa: SIM115
  with pytest.raises(metrics.NotWrittenError, match=r'metrics\.jsonl: No space left on device'):
    writer.write(1, 'train', {'loss': 1.0})
  writer.close()


def test_a_file_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / 'a'
  with whole_files.writing(str(path)) as file:
    file.write('first')
    assert not path.exists()
  with pytest.raises(OSError, match='no space'), whole_files.writing(str(path)) as file:
    file.write('half')
    raise OSError('no space')
  assert path.read_text() == 'first'
