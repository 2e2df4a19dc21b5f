"""Notebooks run from top to bottom in a fresh kernel, and draw."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob('colabs/*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_draws(path):
  notebook = nbformat.read(path, as_version=4)
  # In the root, so that the kernel of the running interpreter imports this polgrad.
  client = nbclient.NotebookClient(
    notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(ROOT)}}
  )
  client.execute()  # raises what a cell raises
  outputs = [o for cell in notebook.cells for o in cell.get('outputs', [])]
  assert any('image/png' in o.get('data', {}) for o in outputs)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_without_outputs(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert not cell.get('outputs') and cell.get('execution_count') is None


def test_there_are_notebooks():
  assert NOTEBOOKS
