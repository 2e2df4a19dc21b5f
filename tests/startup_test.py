"""What an import of polgrad leaves out: libraries that import slowly and that few functions need."""

import subprocess
import sys

import pytest

# Imported by the functions that need them. (rich comes with flax, which the batch is made of.)
NEVER = (
  *('matplotlib', 'orbax', 'grain', 'tensorboardX', 'tensorflow', 'torch', 'transformers'),
  *('reasoning_gym', 'tensorflow_datasets', 'datasets', 'pandas', 'scipy', 'sympy'),
)
LOSSES = (*NEVER, 'optax', 'tokenizers', 'sentencepiece', 'jinja2')


@pytest.mark.parametrize('module, absent', [('losses', LOSSES), ('train', NEVER)])
def test_an_import_leaves_out_what_only_some_runs_need(module, absent):
  code = f'import sys, polgrad.{module}; print(*({set(absent)} & sys.modules.keys()))'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == []
