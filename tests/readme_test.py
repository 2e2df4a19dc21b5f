"""What the README shows works as written."""

import importlib.util
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from polgrad import build, methods, optim, train
from polgrad.options import from_text
from polgrad.registry import part
from tests import hub

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PAGES = (
  *('README.md', 'CONTRIBUTING.md', 'docs/architecture.md'),
  *('docs/data.md', 'docs/before_a_run.md', 'docs/looking_inside.md', 'docs/tracking.md'),
  *(
    'docs/models.md',
    'docs/pods.md',
    'docs/asynchronous.md',
    'docs/reward_models.md',
    'docs/online_preferences.md',
  ),
  *('docs/judges.md', 'docs/games.md', 'docs/preferences.md', 'docs/controlled_decoding.md'),
  *('docs/environments.md', 'docs/tools.md', 'docs/turn_credit.md', 'docs/trees.md'),
  *('docs/adapters.md', 'docs/curricula.md'),
)
LOSS, MINE = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_the_loss_runs():
  names = {}
  exec(compile(LOSS, 'README.md', 'exec'), names)
  assert math.isfinite(names['value'])
  # The tokens of the better row become more likely, those of the other less.
  assert (np.asarray(names['gradient'][0]) < 0).all()
  assert (np.asarray(names['gradient'][1]) > 0).all()


@pytest.fixture
def mine(tmp_path):
  """The config file of the README beside its data, and the text of its options."""
  record = json.loads(re.search(r'`(\{"prompt.*?\})`', README)[1])
  data = tmp_path / 'problems.jsonl'
  data.write_text(''.join(json.dumps(record) + '\n' for _ in range(100)))
  file = tmp_path / 'mine.py'
  file.write_text(MINE)
  spec = importlib.util.spec_from_file_location('mine', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module, f'path={hub.small("qwen3", tmp_path)},data={data},steps=50'


def test_the_config_file_has_its_own_data_reward_system_prompt_and_schedule(mine):
  module, options = mine
  config = module.get_config(options)
  phase = config.phases.train
  schedule = part(optim.cosine, warmup=10, steps=100, end=0.1)
  assert phase.optimizer.schedule.to_dict() == schedule.to_dict()
  # A flag of the README, and what it says of schedules.
  path, value = re.search(r'--config\.(\S+)=([\d.]+)\n', README).groups()
  config.update_from_flattened_dict({path: float(value)})
  config.phases.train.steps = 40
  assert phase.optimizer.schedule.steps == 100
  built = build.build(config).phases['train']
  record = built.source[0]
  assert record['messages'][0] == {'role': 'system', 'content': 'Answer with one word.'}
  scores = built.score(['Lima', 'It is Lima', 'Quito'], [record] * 3, [1, 3, 1])
  np.testing.assert_allclose(scores.total, [1.0, 0.8, 0.0], atol=1e-6)


def test_the_config_file_trains(mine, tmp_path, undrawn):
  module, options = mine
  config = module.get_config(f'{options},smoke')
  config.phases.train.collect.prompt_length = 150  # the test's small vocabulary makes long prompts
  config.evaluation.prompt_length = 150
  state = train.run(config, str(tmp_path / 'run'))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))
  assert int(state.phase_step) == 2


def test_the_numbers_of_methods():
  said = [int(n) for n in re.findall(r'(\d+) (?:published|policy gr|preference loss)', README)]
  families = [len(methods.FAMILIES[family]) for family in ('policy_gradient', 'preference')]
  assert said == [len(methods.TABLE), *families], 'run `make pages`'


@pytest.mark.parametrize('text', re.findall(r'experiments/run\.py:([^\s`]*method=[^\s`]+)', README))
def test_the_commands_compose(text):
  config = from_text(text)
  config.mesh.data = 1
  build.build(config)


@pytest.mark.parametrize('page', PAGES)
def test_paths_exist(page):
  text = (ROOT / page).read_text()
  folders = 'experiments|launch|docs|colabs|polgrad|benchmarks|tests'
  for path in re.findall(rf'(?<![\w/.])(?:{folders})/[\w/.]*\w\.(?:py|sh|md|ipynb|png)', text):
    assert (ROOT / path).exists(), path
  for target in re.findall(r'\]\(([^):#]+)\)', text):
    assert ((ROOT / page).parent / target).exists(), target
