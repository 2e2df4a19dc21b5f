"""Compilation in the background: what is compiled ahead is what a call runs, and errors are its own."""

import resource
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import compiling, sharding


def program_of(traced: list, name: str, factor: int) -> compiling.Program:
  """Multiplies; `traced` gets what traces it: (name, thread, devices of its mesh)."""

  def multiply(x):
    mesh = jax.sharding.get_abstract_mesh()
    traced.append((name, threading.current_thread().name, sharding.data_parallel_size(mesh)))
    return factor * x

  return compiling.Program(compiling.jit(multiply))


def test_a_program_compiled_ahead_is_traced_after_the_first_one_and_run_when_called():
  traced = []
  first, later = program_of(traced, 'first', 3), program_of(traced, 'later', 2)
  mesh = sharding.make_mesh(data=2)
  placed = lambda size: sharding.place_batch(mesh, np.arange(size, dtype=np.float32))
  with jax.set_mesh(mesh):
    later.ahead(lambda: (placed(4),))
    np.testing.assert_array_equal(first(placed(4)), 3 * np.arange(4))
    for size in (4, 4, 8):
      np.testing.assert_array_equal(later(placed(size)), 2 * np.arange(size))
    first(placed(4))
  ours, other = ('MainThread', 2), ('compiling ahead', 2)
  assert traced == [('first', *ours), ('later', *other), ('later', *ours)]


def test_a_program_that_nothing_comes_before_compiles_when_called():
  traced = []
  program = program_of(traced, 'only', 2)
  with jax.set_mesh(sharding.make_mesh()):
    program.ahead(lambda: (jnp.ones(3),))
    np.testing.assert_array_equal(program(jnp.ones(3)), 2 * np.ones(3))
  assert [thread for _, thread, _ in traced] == ['MainThread']


def test_an_error_is_that_of_the_call():
  def fails(x):
    raise ValueError(f'{threading.current_thread().name}: no such shape')

  program = compiling.Program(jax.jit(fails))
  with jax.set_mesh(sharding.make_mesh()):
    program.ahead(lambda: (jnp.zeros(3),))
    program_of([], 'first', 1)(jnp.zeros(3))
    with pytest.raises(ValueError, match='MainThread: no such shape'):
      program(jnp.zeros(3))


def test_where_no_thread_starts_the_call_compiles(monkeypatch):
  def refuse(thread):
    raise RuntimeError("can't start new thread")

  traced = []
  program = program_of(traced, 'later', 2)
  with jax.set_mesh(sharding.make_mesh()):
    program.ahead(lambda: (jnp.ones(3),))
    with monkeypatch.context() as patch:
      patch.setattr(threading.Thread, 'start', refuse)
      program_of(traced, 'first', 1)(jnp.ones(3))
    np.testing.assert_array_equal(program(jnp.ones(3)), 2 * np.ones(3))
  assert [thread for _, thread, _ in traced] == ['MainThread', 'MainThread']


def test_without_jit_nothing_is_traced():
  later = program_of([], 'later', 2)
  branches = compiling.Program(jax.jit(lambda x: x if x.sum() > 0 else -x))
  with jax.set_mesh(sharding.make_mesh()):
    later.ahead(lambda: (jnp.ones(3),))
    with jax.disable_jit():
      np.testing.assert_array_equal(branches(-jnp.ones(3)), np.ones(3))
      np.testing.assert_array_equal(later(jnp.ones(3)), 2 * np.ones(3))


def test_nothing_is_compiled_for_a_main_that_has_ended(monkeypatch):
  done, first = [], program_of([], 'first', 3)

  class Jitted:
    def lower(self):
      done.append('traced')
      return self

    def compile(self):
      done.append('compiled')

    def __call__(self):
      return 'called'

  later = compiling.Program(Jitted())
  with jax.set_mesh(sharding.make_mesh()):
    for ended in (True, False):
      later.ahead(tuple)
      with monkeypatch.context() as patch:
        if ended:
          patch.setattr(threading, 'main_thread', threading.Thread)
        first(jnp.ones(3))
        assert later() == 'called'  # waits for the thread
  assert done == ['traced', 'traced', 'compiled']


def test_a_program_that_is_gone_is_not_compiled():
  traced = []
  program = program_of(traced, 'gone', 2)
  with jax.set_mesh(sharding.make_mesh()):
    program.ahead(lambda: (jnp.ones(3),))
    del program
    program_of(traced, 'other', 2)(jnp.ones(3))
  assert [name for name, _, _ in traced] == ['other']


def faults_of_calls(wrap) -> int:
  """Pages that 20 calls at each depth from 1 to 200 touch anew, in a thread with its own frames."""
  found = []

  def leaf(*values):
    return len(values)

  def deeper(left):
    for _ in range(20):
      leaf(1, 2, 3, 4)
    return deeper(left - 1) if left else 0

  def count():
    deeper(200)  # what is made once
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    deeper(200)
    found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

  thread = threading.Thread(target=wrap(count))
  thread.start()
  thread.join()
  return found[0]


def test_frames_in_one_chunk_take_no_new_pages():
  assert faults_of_calls(lambda count: count) > 20 > 5 > faults_of_calls(compiling.in_one_chunk)


def test_a_function_in_one_chunk_is_the_function():
  def divide(x, *, by):
    """Divides."""
    return x / by

  made = compiling.in_one_chunk(divide)
  assert (made.__name__, made.__doc__, made(6, by=3)) == ('divide', 'Divides.', 2)
  with pytest.raises(ZeroDivisionError):
    made(1, by=0)


def test_a_small_program_is_compiled_without_optimizations(monkeypatch):
  monkeypatch.setattr(compiling, 'is_quick', lambda: False)
  level = 'xla_backend_optimization_level'
  assert (compiling.options()[level], compiling.options(small=True)[level]) == (1, 0)
  assert compiling.jit(lambda x: x + 1, small=True)(2) == 3


def test_loops_are_not_unrolled_unless_the_user_says_what_xla_gets(monkeypatch):
  monkeypatch.setattr(compiling.gc, 'freeze', lambda: None)  # other tests collect what they made
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
  compiling.prepare()
  compiling.prepare()
  flags = (
    f'--xla_force_host_platform_device_count=2 {compiling.EXTRA}=xla_cpu_disable_loop_unrolling'
  )
  assert compiling.os.environ['XLA_FLAGS'] == flags
  # XLA ends the process at a flag that it does not know.
  subprocess.run([sys.executable, '-c', 'import jax; jax.numpy.zeros(1)'], check=True)
  monkeypatch.setenv('XLA_FLAGS', f'{compiling.EXTRA}=xla_cpu_optimize_for_size')
  compiling.prepare()
  assert compiling.os.environ['XLA_FLAGS'] == f'{compiling.EXTRA}=xla_cpu_optimize_for_size'
  monkeypatch.setenv('XLA_FLAGS', 'flags.txt')  # XLA reads flags from a file of this name
  compiling.prepare()
  assert compiling.os.environ['XLA_FLAGS'] == 'flags.txt'
