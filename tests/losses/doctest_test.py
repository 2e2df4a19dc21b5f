"""The examples in the docstrings of polgrad.losses run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import losses

NAMES = ['', *(f'.{module.name}' for module in pkgutil.iter_modules(losses.__path__))]
WITH_EXAMPLES = ('surrogates', 'advantages', 'preference_losses', 'aggregation')


def examples_of(name):
  """The docstrings of a module and of its functions, with the names that the examples may use."""
  module = importlib.import_module(f'polgrad.losses{name}')
  names = {'jnp': jnp, 'np': np, name.removeprefix('.'): module}
  return doctest.DocTestFinder().find(module, globs=names)


@pytest.mark.parametrize('name', NAMES)
def test_examples_print_what_they_say(name):
  report = []
  for test in examples_of(name):
    doctest.DocTestRunner().run(test, out=report.append)
  assert not report, ''.join(report)


@pytest.mark.parametrize('name', WITH_EXAMPLES)
def test_every_public_function_has_an_example(name):
  module = getattr(losses, name)
  public = {
    fn.__qualname__
    for fn in vars(module).values()
    if inspect.isfunction(fn) and fn.__module__ == module.__name__ and fn.__name__[0] != '_'
  }
  shown = {test.name.split('.')[-1] for test in examples_of(f'.{name}') if test.examples}
  assert public and public <= shown


def test_the_face_names_every_public_module():
  public = {name[1:] for name in NAMES if name and not name.startswith('._')}
  assert set(losses.__all__) == public
  assert all(name in losses.__doc__ for name in public)
