"""A module imports only from lower levels, and libraries only where they belong."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent / 'polgrad'
PAGE = ROOT.parent / 'docs' / 'architecture.md'
# The page docs/architecture.md shows this table; a folder stands for its modules.
LEVELS = {
  'types': 0,
  'arrays': 0,
  'reductions': 0,
  'registry': 0,
  'losses': 1,
  'sharding': 1,
  'models': 2,
  'rewards': 1,
  'environments': 2,
  'data': 1,
  'optim': 1,
  'checkpoint': 1,
  'metrics': 1,
  'metric_history': 1,
  'credit': 2,
  'curricula': 3,
  'objectives': 2,
  'tabular': 3,
  'sampling': 3,
  'learner': 3,
  'packing': 2,
  'methods': 5,
  'tasks': 5,
  'presets': 5,
  'compose': 6,
  'options': 7,
  'collect': 4,
  'build': 5,
  'cli': 1,
  'overrides': 0,
  'digests': 0,
  'identity': 0,
  'compiling': 0,
  'jsons': 0,
  'paths': 0,
  'mirrors': 0,
  'evaluate': 6,
  'preference_evaluation': 1,
  'compare': 8,
  'loading': 7,
  'convert': 8,
  'sample': 8,
  'prompt_weights': 8,
  'update_sparsity': 8,
  'weight_changes': 1,
  'lm_eval': 8,
  'phases': 7,
  'train': 8,
  'verify': 9,
  'checks': 4,
  'check': 8,
  'aot': 8,
  'preflight': 9,
  'explain': 7,
  'workdirs': 2,
  'row_files': 3,
  'stored_rows': 1,
  'teacher_logp': 8,
  'teacher_service': 8,
  'view': 6,
  'inspect': 10,
  'preemption': 1,
  'trackers': 1,
  'speed': 1,
  'progress': 0,
  'techniques': 1,
  'hlo': 0,
  'whole_files': 0,
  'barriers': 0,
  'exchanges': 1,
  'report': 2,
  'reward_models': 3,
  'teachers': 3,
}
FILES = sorted(p for p in ROOT.rglob('*.py') if p.parent != ROOT or p.stem != '__init__')
# library -> the units of polgrad that may import it
HOMES = {
  'flax': {'types', 'reductions', 'models'},
  'ml_collections': {
    *('registry', 'build', 'cli', 'identity', 'overrides', 'train', 'verify'),
    *('methods', 'tasks', 'presets', 'compose', 'options', 'check', 'explain', 'loading'),
  },
  'orbax': {'checkpoint'},
  'absl': {
    *('check', 'cli', 'compare', 'convert', 'evaluate', 'explain', 'inspect', 'lm_eval', 'loading'),
    *(
      'metrics',
      'phases',
      'preflight',
      'prompt_weights',
      'report',
      'row_files',
      'sample',
      'teacher_logp',
      'teacher_service',
      'trackers',
      'train',
      'update_sparsity',
      'verify',
      'view',
    ),
    'workdirs',
  },
}


def unit(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imported(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names |= {f'{node.module}.{a.name}' for a in node.names}
  return names


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_come_from_lower_levels(path):
  own = unit(path)
  for name in imported(path):
    parts = name.split('.')
    if parts[0] == 'polgrad' and parts[1] not in (own, '__version__'):
      assert LEVELS[parts[1]] < LEVELS[own] or parts[1] in ('registry', 'paths'), (
        f'{own} imports {name}'
      )


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_place(path):
  for name in imported(path):
    library = name.split('.')[0]
    assert unit(path) in HOMES.get(library, {unit(path)}), f'{path} imports {name}'


def test_the_page_has_the_level_of_every_unit():
  rows = re.findall(r'^\| (\d+) \| (.*?) \|', PAGE.read_text(), re.MULTILINE)
  found = {name.rstrip('/'): int(n) for n, names in rows for name in re.findall('`(.*?)`', names)}
  assert found == LEVELS


def test_every_unit_has_a_level():
  assert {unit(p) for p in FILES} == LEVELS.keys()


def test_losses_know_only_jax_and_the_ground():
  for path in FILES:
    if unit(path) == 'losses':
      roots = {n.split('.')[0] for n in imported(path)}
      assert roots <= {'jax', 'chex', 'polgrad', 'collections', 'typing'}, path


def test_a_function_fits_a_screen():
  """At most 60 lines, the docstring not counted."""
  long = {}
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body and (lines := body[-1].end_lineno - body[0].lineno + 1) > 60:
          long[f'{path}: {node.name}'] = lines
  assert not long
