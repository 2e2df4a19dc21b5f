"""Before JAX starts: eight CPU devices, no implicit broadcasting, and a cache of compiled programs."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import pytest

from polgrad import compiling

# Of programs that run once, compiling is what takes time: settings of `compiling` for every `jax.jit`.
quick = [f'--{name}={str(value).lower()}' for name, value in compiling.CPU.items()]
os.environ['XLA_FLAGS'] = ' '.join(['--xla_force_host_platform_device_count=8', *quick])
jax.config.update('jax_numpy_rank_promotion', 'raise')
CACHE = pathlib.Path(os.environ.get('POLGRAD_TEST_CACHE', '~/.cache/polgrad/tests')).expanduser()
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
# The folder of SmolLM2, which `make test` makes. Experiments on real models read the variable too.
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault('POLGRAD_SMOLLM2', str(ROOT / '.cache/smollm2'))


@pytest.fixture(scope='session')
def smollm2() -> str:
  """The Hugging Face folder of SmolLM2-135M-Instruct."""
  folder = os.environ['POLGRAD_SMOLLM2']
  if not os.path.exists(folder):
    pytest.fail(
      f'{folder} is missing: make test (or python launch/fetch_smollm2.py {folder}) makes it'
    )
  return folder


@pytest.fixture
def quick_compiler(monkeypatch):
  """For tests that compile much and compute little: quick to compile, slow to run."""
  monkeypatch.setattr(compiling, 'options', lambda: {})  # they would win over the setting below
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
