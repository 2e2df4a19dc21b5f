"""Before JAX starts: eight CPU devices, no implicit broadcasting, and a cache of compiled programs."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
CACHE = pathlib.Path(os.environ.get('POLGRAD_TEST_CACHE', '~/.cache/polgrad/tests')).expanduser()
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture
def quick_compiler():
  """For tests that compile much and compute little: quick to compile, slow to run."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
