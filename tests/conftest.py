"""Before JAX starts: eight CPU devices, no implicit broadcasting, and a cache of compiled programs.

Compiling is most of what the tests do, so the compiler is told to be quick, not to make fast code.
"""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
)

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
CACHE = pathlib.Path(os.environ.get('POLGRAD_TEST_CACHE', '~/.cache/polgrad/tests')).expanduser()
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
