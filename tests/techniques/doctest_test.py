"""Examples of the techniques run, in docstrings and on their page; all functions are described."""

import doctest
import importlib
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from polgrad import techniques


@pytest.mark.parametrize('name', techniques.__all__)
def test_examples_print_what_they_say(name):
  module = importlib.import_module(f'polgrad.techniques.{name}')
  assert name in techniques.__doc__
  with jax.enable_x64(False):
    found = doctest.testmod(module, extraglobs={'jnp': jnp})
  assert found.attempted and not found.failed
  for fn in vars(module).values():
    if inspect.isfunction(fn) and fn.__module__ == module.__name__ and fn.__name__[0] not in '_<':
      assert fn.__doc__, fn.__name__


def test_the_page_runs_and_names_every_module():
  page = (pathlib.Path(__file__).parents[2] / 'docs/techniques.md').read_text()
  assert set(re.findall(r'^\| `(\w+)`', page, re.MULTILINE)) == set(techniques.__all__)
  [code] = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  names = {}
  exec(code, names)
  assert names['wasted'] > 0.5 and jnp.isfinite(names['loss']) and names['penalty'] > 0
  assert jnp.allclose(names['plan'].sum(axis=1), 1 / 4, atol=0.03)
