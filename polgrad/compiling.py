"""`jax.jit` with compiler settings for the default platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# Settings of XLA on CPU. A step spends its time in matrix products, which are library calls. With these
# settings the code around them runs as fast, and compiles in about half the time (benchmarks/README.md).
CPU = {'xla_backend_optimization_level': 1, 'xla_cpu_use_fusion_emitters': False}


def jit(function: Callable, **settings: Any) -> Callable:
  """`jax.jit` with `options()`; only for an outermost jit: XLA refuses options of an inner one."""
  return jax.jit(function, compiler_options=options(), **settings)


def options() -> dict[str, Any]:
  """Compiler settings by name for the default platform.

  {} on all platforms but CPU, and where JAX_DISABLE_MOST_OPTIMIZATIONS asks for less than they would.
  """
  less = jax.config.values['jax_disable_most_optimizations']
  return _known() if jax.default_backend() == 'cpu' and not less else {}


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
