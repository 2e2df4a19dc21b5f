"""Settings before JAX starts, and fixtures of all tests.

JAX gets eight CPU devices, refuses implicit broadcasting, and keeps a cache of compiled programs.
"""

import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import zlib

# Most programs of the tests run once, so most time is compiling: they compile quickly and run slowly,
# also in the processes that tests start, except where `fast_programs` is asked for.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
# Reading even the smallest program from the cache takes less than half as long as compiling it.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import jaxlib
import pytest
from jax._src.interpreters import mlir

from polgrad import compiling, report

ROOT = pathlib.Path(__file__).parents[1]
CACHE = pathlib.Path(os.environ.get('POLGRAD_TEST_CACHE', '~/.cache/polgrad/tests')).expanduser()
# The settings of `compiling`, and one thread for each program: two workers share two cores.
ASK = """
import json
from polgrad import compiling
compiling.CPU['xla_cpu_parallel_codegen_split_count'] = 1
print(json.dumps(compiling.options()))
"""


def quick() -> dict:
  """The settings of `ASK` that this version of XLA knows. An unknown flag would end the process.

  Another process finds out, because XLA reads its flags only once; the answer is kept for this jaxlib.
  """
  path = CACHE / f'options_{jaxlib.__version__}_{zlib.crc32(ASK.encode())}.json'
  if not path.exists():
    env = {**os.environ, 'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'false'}
    command = [sys.executable, '-c', ASK]
    asked = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(asked.stdout)
  return json.loads(path.read_text())


flags = [f'--{name}={str(value).lower()}' for name, value in quick().items()]
os.environ['XLA_FLAGS'] = ' '.join(['--xla_force_host_platform_device_count=8', *flags])
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(CACHE)
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_numpy_rank_promotion', 'raise')
# JAX makes a context of MLIR for each program: 4 of the 15 ms of a small one. One for a file suffices.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)
# The folder of SmolLM2, which `make test` makes. Experiments on real models read the variable too.
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


@pytest.fixture(scope='module')
def fast_programs():
  """Programs are optimized until the end of the file, for files that compile little and compute much."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='module')
def compiled_once():
  """Runs of the file whose phases have equal settings compile them only once: `runs.share_programs`."""
  from tests import runs  # imports polgrad, which the files that start no run need not

  with pytest.MonkeyPatch.context() as patch:
    runs.share_programs(patch.setattr)
    yield


@pytest.fixture(scope='module')
def samplers_once():
  """Collectors of the file that sample alike share their samplers: `runs.share_samplers`."""
  from tests import runs

  with pytest.MonkeyPatch.context() as patch:
    runs.share_samplers(patch.setattr)
    yield


@pytest.fixture
def undrawn(monkeypatch):
  """Runs of the test do not draw report.png, which takes as long as a step."""
  monkeypatch.setattr(report, 'draw', lambda workdirs: workdirs[0])


@pytest.fixture(autouse=True, scope='module')
def forget():
  """Drops JAX's caches after each file: the larger they are, the slower every trace and compilation."""
  yield
  jax.clear_caches()
  mlir.make_ir_context.cache_clear()


# The dearest files, 10 to 80 CPU seconds each. They come first: no worker is left with one at the end.
LONG = (
  'mesh', 'train', 'methods', 'transformers_parity', 'products', 'properties', 'objectives', 'hub',
  'rollouts', 'experiments', 'update', 'lora', 'weights', 'oracles', 'sampler', 'lm_eval', 'branching',
  'advantages', 'surrogates', 'selections', 'shared_prompt', 'packing',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """`make test` deals files out in this order (--no-loadscope-reorder)."""
  rank = {f'{name}_test': i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
  """Runs a test as pytest does, with frames of Python in one chunk: tracing takes a seventh less."""
  run = item.config.pluginmanager.get_plugin('runner').pytest_runtest_protocol
  return compiling.in_one_chunk(run)(item, nextitem)


def pytest_collection_finish():
  """Lets the garbage collector pass over what lives as long as the process: modules and tests."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)
