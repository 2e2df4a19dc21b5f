"""Safetensors files: parts are read as they were written, and a broken file is refused by name."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polgrad.models import tensors
from polgrad.models.tensors import Tensor

SHAPES = {'vector': (5,), 'matrix': (6, 4), 'cube': (3, 2, 4)}


def arrays(dtype=np.float32):
  random = np.random.default_rng(0)
  return {name: random.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def unread(arrays):
  return {n: Tensor(x.shape, x.dtype, lambda index, x=x: x[index]) for n, x in arrays.items()}


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_part_of_a_tensor_can_be_read(dtype, tmp_path):
  wanted = arrays(dtype)
  save_file(wanted, tmp_path / 'model.safetensors')
  found = tensors.open_folder(tmp_path)
  assert found.keys() == wanted.keys()
  for name, tensor in found.items():
    assert (tensor.shape, tensor.dtype) == (SHAPES[name], np.dtype(dtype))
    np.testing.assert_array_equal(tensor.all(), wanted[name])
    part = tuple(slice(1, size) for size in tensor.shape)
    np.testing.assert_array_equal(tensor.read(part), wanted[name][part])


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_safetensors_library_reads_what_is_written(dtype, tmp_path):
  wanted = arrays(dtype)
  tensors.write_folder(tmp_path, unread(wanted))
  found = load_file(tmp_path / 'model.safetensors')
  assert found.keys() == wanted.keys()
  for name, x in found.items():
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, wanted[name])


def test_transposed_arrays_are_written_in_the_order_of_their_axes(tmp_path):
  tensors.write_folder(tmp_path, unread({'x': arrays()['matrix'].T}))
  np.testing.assert_array_equal(
    load_file(tmp_path / 'model.safetensors')['x'], arrays()['matrix'].T
  )


def test_shards_stay_below_their_limit_and_are_joined(tmp_path):
  wanted = arrays()
  tensors.write_folder(tmp_path, unread(wanted), max_shard_bytes=100)  # 20, 96 and 96 bytes
  names = sorted(file.name for file in tmp_path.iterdir())
  assert names == [
    *(f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)), 'model.safetensors.index.json',
  ]  # fmt: skip
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == 212
  found = tensors.open_folder(tmp_path)
  for name, x in wanted.items():
    np.testing.assert_array_equal(found[name].all(), x)


def test_a_file_that_was_cut_off_is_refused_with_its_sizes(tmp_path):
  file = tmp_path / 'model.safetensors'
  save_file(arrays(), file)
  whole = file.read_bytes()
  for kept, message in ((len(whole) - 1, f'has {len(whole) - 1} bytes instead of {len(whole)}'),
                        (40, '40 bytes are too few'), (3, '3 bytes are too few'),
                        (0, '0 bytes are too few')):  # fmt: skip
    file.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=rf'model\.safetensors.*{message}'):
      tensors.open_folder(tmp_path)


def test_missing_shards_and_broken_promises_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'model\.safetensors is missing'):
    tensors.open_folder(tmp_path)
  tensors.write_folder(tmp_path, unread(arrays()), max_shard_bytes=100)
  index = tmp_path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  content['weight_map']['ghost'] = 'model-00001-of-00003.safetensors'
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"promises \['ghost'\]"):
    tensors.open_folder(tmp_path)
  for i in (2, 3):
    (tmp_path / f'model-0000{i}-of-00003.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match=r'model-00002-of-00003.*model-00003-of-00003'):
    tensors.open_folder(tmp_path)


def test_other_dtypes_are_refused(tmp_path):
  save_file({'quantised': np.zeros(3, np.int8)}, tmp_path / 'model.safetensors')
  with pytest.raises(
    ValueError, match=r"quantised has dtype I8; supported: \['BF16', 'F16', 'F32'\]"
  ):
    tensors.open_folder(tmp_path)


def test_a_new_folder_is_whole_or_absent(tmp_path):
  with tensors.new_folder(tmp_path / 'a' / 'b') as made:
    (made / 'file').write_text('x')
    assert not (tmp_path / 'a' / 'b').exists()
  assert (tmp_path / 'a' / 'b' / 'file').read_text() == 'x'
  with pytest.raises(RuntimeError), tensors.new_folder(tmp_path / 'a' / 'c') as made:
    (made / 'file').write_text('x')
    raise RuntimeError
  assert [path.name for path in (tmp_path / 'a').iterdir()] == ['b']
  with pytest.raises(FileExistsError, match='not empty'), tensors.new_folder(tmp_path / 'a' / 'b'):
    raise AssertionError('it must not come this far')


def header_file(path, entries, size=None):
  """A file with this header, and as many bytes as it says."""
  header = json.dumps(entries).encode() if isinstance(entries, dict) else entries
  end = size if size is not None else max(e['data_offsets'][1] for e in entries.values())
  path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(end))


def entry(begin, end, shape, dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize(
  ('entries', 'why'),
  [
    ({'a': entry(0, 8, [2]), 'b': entry(4, 12, [2])}, 'b begins at byte 4, where 8 is expected'),
    ({'a': entry(0, 8, [2]), 'b': entry(12, 20, [2])}, 'b begins at byte 12, where 8 is expected'),
    ({'a': entry(4, 12, [2])}, 'a begins at byte 4, where 0 is expected'),
    ({'a': entry(0, 8, [3])}, r'a of shape \[3\] needs 12 bytes'),
    ({'a': entry(0, 8, [-2])}, r'a has shape \[-2\]'),
    ({'a': entry(-8, 8, [2])}, 'a has shape'),
    ({'a': entry(0, 8, 2)}, 'a has shape 2'),
    ({'a': entry(0, 8, [2.0])}, 'a has shape'),
    ({'a': {'dtype': 'F32', 'data_offsets': [0, 8]}}, 'a has shape None'),
    (b'{"a": 1}', 'header is malformed'),
    (b'[]', 'header is malformed'),
    (b'{"a"', 'header is malformed'),
    (b'[' * 50_000, 'header is malformed'),
    (b'\xff' * 20, 'header is malformed'),
  ],
)
def test_headers_that_lie_are_refused(entries, why, tmp_path):
  header_file(tmp_path / 'model.safetensors', entries, None if isinstance(entries, dict) else 8)
  with pytest.raises(ValueError, match=rf'model\.safetensors.*{why}'):
    tensors.open_folder(tmp_path)


@pytest.mark.parametrize('name', ['../model.safetensors', '/etc/passwd', 'a/b', '..', '', 3])
def test_an_index_that_names_files_elsewhere_is_refused(name, tmp_path):
  index = {'weight_map': {'a': name}}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match='which is no file of its folder'):
    tensors.open_folder(tmp_path)


@pytest.mark.parametrize('text', ['{', '[]', '{"weight_map": 1}', '{}', '\x00'])
def test_a_malformed_index_is_refused(text, tmp_path):
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match='is no index of tensors'):
    tensors.open_folder(tmp_path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'model.safetensors')
  with pytest.raises(FileNotFoundError, match='is missing'):
    tensors.open_folder(tmp_path)
