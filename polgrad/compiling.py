"""`jax.jit` with compiler settings for the default platform, and compilation in the background."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax

# Settings of XLA on CPU. A step spends its time in matrix products, which are library calls. With these
# settings the code around them runs as fast, and compiles in about half the time (benchmarks/README.md).
CPU = {'xla_backend_optimization_level': 1, 'xla_cpu_use_fusion_emitters': False}


def jit(function: Callable, **settings: Any) -> Callable:
  """`jax.jit` with `options()`; only for an outermost jit: XLA refuses options of an inner one."""
  return jax.jit(function, compiler_options=options(), **settings)


class Program:
  """A jitted function that may be compiled before it is called, while the process does other work."""

  def __init__(self, jitted: Callable):
    self._jitted, self._thread = jitted, None

  def __call__(self, *args: Any) -> Any:
    thread, self._thread = self._thread, None
    if thread is not None:
      thread.join()
    return self._jitted(*args)

  def ahead(self, arguments: Callable[[], tuple]) -> None:
    """Begins to compile in the background.

    The next call waits until this is done, and compiles again if its arguments have other shapes. An
    error in the background is ignored: the call meets it again.

    Args:
      arguments: makes arguments of the shapes, types and shardings to compile for; nothing is computed
        with them.
    """
    mesh = jax.sharding.get_mesh()  # each thread has its own

    def begin() -> None:
      with contextlib.suppress(Exception), jax.set_mesh(mesh):
        self._jitted.lower(*arguments()).compile()

    self._thread = threading.Thread(target=begin, name='compiling ahead')
    self._thread.start()


def options() -> dict[str, Any]:
  """Compiler settings by name for the default platform.

  {} on all platforms but CPU, and where JAX_DISABLE_MOST_OPTIMIZATIONS asks for less than they would.
  """
  return _known() if jax.default_backend() == 'cpu' and not is_quick() else {}


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
