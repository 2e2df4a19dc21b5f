import jax
import pytest


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(autouse=True)
def quick(quick_compiler):
  """Everything here compiles small programs that run once."""
