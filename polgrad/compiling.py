"""`jax.jit` with settings of the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# The work of a step is in products, which are library calls: these make the loops around them run as
# fast, and compile them in about half the time (benchmarks/README.md).
CPU = {'xla_backend_optimization_level': 1, 'xla_cpu_use_fusion_emitters': False}


def jit(function: Callable, **settings: Any) -> Callable:
  """`jax.jit` with `options`, for calls from outside: XLA refuses options of a jit within another."""
  return jax.jit(function, compiler_options=options(), **settings)


def options() -> dict[str, Any]:
  """The compiler's settings for the default platform."""
  return _known() if jax.default_backend() == 'cpu' else {}


@functools.cache
def _known() -> dict[str, Any]:
  """Those of `CPU` that this XLA knows."""

  def known(option: tuple) -> bool:
    try:
      jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except jax.errors.JaxRuntimeError:
      return False
    return True

  return dict(filter(known, CPU.items()))
