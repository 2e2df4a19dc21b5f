"""What the README shows works as it stands."""

import pathlib
import re

from polgrad import build

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_importing_a_loss(capsys):
  exec(compile(BLOCKS[0], 'README.md', 'exec'), {})
  printed = capsys.readouterr().out
  assert 'Array' in printed and 'nan' not in printed


def test_an_idea_of_your_own():
  """The block up to the run itself, which takes minutes; then the configuration builds."""
  setup, _, run = BLOCKS[1].rpartition('train.run(')
  names = {}
  exec(compile('import jax.numpy as jnp\n' + setup, 'README.md', 'exec'), names)
  assert run.strip().startswith('config')
  objective = build.build(names['config']).phases['rl'].objective
  assert objective.requires == {'advantages', 'proximal_logp'}


def test_paths_exist():
  for path in re.findall(
    r'(?:experiments|launch|docs|colabs|polgrad)/[\w/.]+\.(?:py|sh|md|ipynb)', README
  ):
    assert (ROOT / path).exists(), path
