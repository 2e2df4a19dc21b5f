"""`jax.jit` with compiler settings for the default platform, and compilation in the background."""

import contextlib
import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import jax

# Settings of XLA on CPU. A step spends its time in matrix products, which are library calls. With these
# settings the code around them runs as fast, and compiles in about half the time (benchmarks/README.md).
CPU = {
  'xla_backend_optimization_level': 1,
  'xla_cpu_use_fusion_emitters': False,
  # Number of LLVM modules: two a core take nine tenths of the CPU time of XLA's 32.
  'xla_cpu_parallel_codegen_split_count': min(2 * (os.cpu_count() or 1), 32),
}
# Settings that XLA takes for a whole process alone; those of CPUs are read by no other platform.
EXTRA = '--xla_backend_extra_options'
STACK = 2**16 + 2**10  # places of 8 bytes for values, see `in_one_chunk`


def jit(function: Callable, *, small: bool = False, **settings: Any) -> Callable:
  """`jax.jit` with `options()`; only for an outermost jit: XLA refuses options of an inner one.

  Args:
    small: whether it computes so little that its compilation is all that takes time.
    settings: of `jax.jit`.
  """
  return jax.jit(function, compiler_options=options(small), **settings)


def in_one_chunk(function: Callable) -> Callable:
  """The same function, with memory of one piece for the Python frames of what it calls.

  CPython keeps frames in chunks of 16 KiB, and the kernel gets a chunk back as soon as its first frame
  returns. Tracing calls deeply and crosses the end of a chunk again and again: of GRPO's update
  12,000 times, a seventh of the time (benchmarks/README.md). The frame of this function says that it
  needs more than 512 KiB, of which it uses none, so Python takes one chunk of 1 MiB for it, and the
  rest holds the frames of some thousand nested calls.
  """

  @functools.wraps(function)
  def call(*args: Any, **settings: Any) -> Any:
    return function(*args, **settings)

  call.__code__ = call.__code__.replace(co_stacksize=STACK)
  return call


class Program:
  """A jitted function that may be compiled before it is called, while the process does other work."""

  # Programs whose compilation was asked for and has not begun; the lock is of them and their threads.
  _waiting: ClassVar[weakref.WeakSet['Program']] = weakref.WeakSet()
  _lock: ClassVar[threading.Lock] = threading.Lock()

  def __init__(self, jitted: Callable):
    self._jitted, self._thread, self._called = jitted, None, False

  def __call__(self, *args: Any, **settings: Any) -> Any:
    with self._lock:
      thread, self._thread = self._thread, None
      if self in self._waiting:  # nothing came before this call: it compiles by itself
        self._waiting.discard(self)
        thread = None
    if thread is not None:
      thread.join()
    # Others that wait begin once this program is traced, while XLA compiles it.
    if self._waiting and not jax.config.jax_disable_jit:
      lowered = None if self._called else self._jitted.lower(*args, **settings)
      with self._lock:
        while self._waiting:
          self._waiting.pop()._begin()
      if lowered:
        lowered.compile()
    self._called = True
    return self._jitted(*args, **settings)

  def _begin(self) -> None:
    """Starts the thread; where the system refuses one, the call compiles."""
    try:
      self._thread.start()
    except RuntimeError:
      self._thread = None

  def ahead(self, arguments: Callable[[], tuple]) -> None:
    """Asks for compilation in the background, which begins when another `Program` is called.

    If that one is new, it is traced first: tracing is work of Python, which runs one thread at a time.
    Then both compile at once. The next call of this one waits until that is done, and compiles again
    if its arguments have other shapes. An error in the background is ignored: the call meets it again.
    Nothing is compiled while `jax.disable_jit` holds, or for a process whose main has ended.

    Args:
      arguments: makes arguments of the shapes, types and shardings to compile for; nothing is computed
        with them.
    """
    # Each thread has its own mesh. The thread does not refer to this object, which may be gone before.
    mesh, jitted = jax.sharding.get_mesh(), self._jitted

    def begin() -> None:
      with contextlib.suppress(Exception), jax.set_mesh(mesh):
        lowered = jitted.lower(*arguments())
        if threading.main_thread().is_alive():  # else the process waits for this thread alone
          lowered.compile()

    with self._lock:
      self._thread = threading.Thread(target=in_one_chunk(begin), name='compiling ahead')
      self._waiting.add(self)


def prepare() -> None:
  """Lets the programs of this process compile sooner; for a main, before JAX makes its first array.

  * XLA does not unroll loops on CPUs: programs compile in three quarters of the time and run as fast
    (benchmarks/README.md). XLA reads XLA_FLAGS once; a value of the user's is kept, and so is
    the name of a file with flags.
  * The garbage collector no longer searches what the imports have made, each time that tracing has made
    many objects.
  """
  given = os.environ.get('XLA_FLAGS', '').strip()
  file = given and not given.startswith('-')
  if EXTRA not in given and not file:
    os.environ['XLA_FLAGS'] = f'{given} {EXTRA}=xla_cpu_disable_loop_unrolling'.strip()
  gc.freeze()


def options(small: bool = False) -> dict[str, Any]:
  """Compiler settings by name for the default platform.

  LLVM optimizes nothing of a program that is `small`, see `jit`.
  {} on all platforms but CPU, and where JAX_DISABLE_MOST_OPTIMIZATIONS asks for less than they would.
  """
  if jax.default_backend() != 'cpu' or is_quick():
    return {}
  return _known() | ({'xla_backend_optimization_level': 0} if small else {})


def is_quick() -> bool:
  """Whether JAX_DISABLE_MOST_OPTIMIZATIONS asks for quick compilation and slow programs."""
  return jax.config.values['jax_disable_most_optimizations']


@functools.cache
def _known() -> dict[str, Any]:
  """The settings of `CPU` that the installed version of XLA accepts."""

  def known(option: tuple) -> bool:
    try:
      jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except jax.errors.JaxRuntimeError:
      return False
    return True

  return dict(filter(known, CPU.items()))
