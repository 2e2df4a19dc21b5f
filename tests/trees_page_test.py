"""What docs/trees.md shows works as written."""

import pathlib
import re
import shlex

import jax.numpy as jnp
import pytest

from polgrad import build, cli
from polgrad.collect import splits
from polgrad.losses import trees
from polgrad.options import from_text
from polgrad.overrides import apply
from polgrad.registry import unbound

PAGE = (pathlib.Path(__file__).parent.parent / 'docs/trees.md').read_text()
COMMANDS = re.findall(r'^python -m polgrad.train (.*)$', PAGE.replace('\\\n', ''), re.MULTILINE)


def test_the_commands_compose():
  found = {}
  for command in COMMANDS:
    [config, *_], changes = cli.split_changes(shlex.split(command))
    made = apply(from_text(config.partition('run.py:')[2]), changes, build.TABLE)
    made.mesh.data = 1
    phase = build.build(made).phases['train']
    found[command.partition('--workdir=runs/')[2].split()[0]] = phase.collect
  assert found.keys() == {'vineppo', 'treerl', 'tokens', 'turns', 'copies', 'search'}
  assert unbound(found['tokens'].split) is splits.every
  assert splits.starts(found['tokens'].split, [b'1'] * 3, found['tokens'].most_steps) == [0, 1, 2]
  assert found['treerl'].leaves == 30 and found['treerl'].rows_per_prompt == 16


@pytest.mark.parametrize('weighting', ['none', 'advantage', 'value'])
def test_the_numbers_of_the_tree_are_those_of_the_functions(weighting):
  row = re.search(rf'^\| `{weighting}` \|(.*)\|$', PAGE, re.MULTILINE)[1]
  node, parent = jnp.array([[1.0], [3], [-1]]) / 3, jnp.array([[0.0], [1], [1]]) / 3
  leaves, before = jnp.array([[2.0], [1], [1]]), jnp.array([[4.0], [2], [2]])
  got = trees.tree_advantages(node, parent, leaves, before, weighting=weighting)
  assert [f'{x:.3f}' for x in got[:, 0].tolist()] == [x.strip() for x in row.split('|')]


def test_the_pages_that_it_names_are_there():
  folder = pathlib.Path(__file__).parent.parent / 'docs'
  for target in re.findall(r'\]\(([^):]+)\)', PAGE):
    assert (folder / target).exists(), target


def test_every_split_is_on_the_page():
  for name in splits.TABLE:
    assert f'`{name}`' in PAGE, name
