"""Compilation in the background: what is compiled ahead is what a call runs, and errors are its own."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import compiling, sharding


def test_a_call_runs_what_was_compiled_ahead():
  traced = []

  def double(x):
    traced.append((threading.current_thread().name, sharding.data_parallel_size(get_mesh())))
    return 2 * x

  get_mesh = jax.sharding.get_abstract_mesh
  mesh = sharding.make_mesh(data=2)
  program = compiling.Program(compiling.jit(double))
  with jax.set_mesh(mesh):
    program.ahead(lambda: (sharding.place_batch(mesh, np.zeros(4, np.float32)),))
    for size in (4, 4, 8):
      x = np.arange(size, dtype=np.float32)
      np.testing.assert_array_equal(program(sharding.place_batch(mesh, x)), 2 * x)
  assert traced == [('compiling ahead', 2), ('MainThread', 2)]


def test_an_error_is_that_of_the_call():
  def fails(x):
    raise ValueError(f'{threading.current_thread().name}: no such shape')

  program = compiling.Program(jax.jit(fails))
  with jax.set_mesh(sharding.make_mesh()):
    program.ahead(lambda: (jnp.zeros(3),))
    with pytest.raises(ValueError, match='MainThread: no such shape'):
      program(jnp.zeros(3))
