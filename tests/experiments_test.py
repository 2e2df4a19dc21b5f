"""Every file in experiments/: it loads, builds, survives JSON, says its source, and trains."""

import ast
import importlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polgrad import build, methods, metrics, train
from polgrad.objectives import Objective
from polgrad.registry import part
from tests import examples
from tests.objectives_test import loss_of

# The package has a function of this name as well.
rollouts = importlib.import_module('polgrad.collect.rollouts')
ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
  p for p in (ROOT / 'experiments').rglob('*.py') if p.stem not in ('__init__', 'common', 'hub')
)
ALL = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in FILES]
# Experiments on files that are not in the repository are built by the tests that have the files.
HUB = [n for n in ALL if '.hub_' in n]
LOCAL = [n for n in ALL if n not in HUB]
EACH = pytest.mark.parametrize('name', LOCAL)
# What the last phase of an experiment is by name.
ALIASES = {
  'experiments.supervised.sft': methods.sft(),
  'experiments.policy_gradient.reinforce': methods.reinforce(),
  'experiments.policy_gradient.rloo': methods.rloo(),
  'experiments.policy_gradient.ppo': methods.ppo(),
  'experiments.policy_gradient.grpo': methods.grpo(),
  'experiments.policy_gradient.dr_grpo': methods.dr_grpo(length=5),
  'experiments.policy_gradient.dapo': methods.dapo(),
  'experiments.policy_gradient.gspo': methods.gspo(),
  'experiments.policy_gradient.cispo': methods.cispo(),
  'experiments.policy_gradient.gmpo': methods.gmpo(),
  'experiments.policy_gradient.sapo': methods.sapo(),
  'experiments.policy_gradient.tba': methods.tba(),
  'experiments.preference.dpo': methods.dpo(),
  'experiments.preference.ipo': methods.ipo(),
  'experiments.preference.simpo': methods.simpo(),
  'experiments.preference.slic': methods.slic(),
  'experiments.preference.online_dpo': methods.online_dpo(),
  'experiments.distillation.on_policy': methods.on_policy_distillation(),
}


# What every run that samples reports of how far it is off its policy.
OFF_POLICY = {
  *(
    'effective_sample_size',
    'ratio_q01',
    'ratio_q50',
    'ratio_q99',
    'sampler_kl',
    'sampler_max_gap',
  ),
  'staleness',
}


def load(name: str, text: str = 'smoke'):
  return importlib.import_module(name).get_config(text)


@EACH
def test_builds_and_survives_json(name):
  for text in ('', 'smoke'):
    config = load(name, text)
    build.build(config)
    data = json.loads(config.to_json())
    assert build.build(data).order == config.order
    assert json.loads(config.to_json()) == data


@pytest.mark.parametrize('name', ALL)
def test_says_source_command_and_stays_short(name):
  module = importlib.import_module(name)
  assert re.search(r'arXiv:\d{4}\.\d{4,5}|standard|Williams 1992', module.__doc__)
  path = name.replace('.', '/') + '.py'
  assert path in module.__doc__ or 'make quickstart' in module.__doc__
  tree = ast.parse((ROOT / path).read_text())
  lines = sum(f.end_lineno - f.lineno + 1 for f in tree.body if isinstance(f, ast.FunctionDef))
  assert lines <= 40


@pytest.mark.parametrize('name', ALIASES)
def test_is_the_method_of_its_name(name):
  """Same loss, gradient, credit and requirements as in `methods`."""
  experiment = build.build(load(name, ''))
  phase, method = experiment.phases[experiment.order[-1]], ALIASES[name]
  assert phase.objective.requires == method.objective.requires
  assert phase.objective.rows_per_prompt == method.objective.rows_per_prompt
  batch = jax.tree.map(jnp.asarray, examples.batch().replace(weights=None))
  results = [_value_and_grad(o, batch) for o in (phase.objective, method.objective)]
  jax.tree.map(np.testing.assert_array_equal, *results)
  batch = batch.replace(valid=jnp.ones(len(batch.mask), bool))
  credited = [c.apply(batch, c.init()) for c in (phase.credit, method.credit)]
  jax.tree.map(np.testing.assert_array_equal, *credited)


def _value_and_grad(objective: Objective, batch):
  fn = jax.value_and_grad(lambda x: loss_of(objective, x, batch)[0])
  return fn(jax.tree.map(jnp.asarray, examples.leaves()))


@pytest.fixture(scope='module')
def made():
  """Samplers by model and settings, parameters by model: making them takes longer than smoke steps."""
  return {}


@pytest.fixture
def shared(made, monkeypatch):
  make_drawer, init_params = rollouts.make_drawer, train.init_params

  def drawer(context, settings):
    key = context.policy.config, tuple(context.frozen), repr(sorted(settings.items(), key=str))
    if key not in made:
      made[key] = make_drawer(context, settings)
    return made[key]

  def params(policy, mesh, seed):
    key = policy.config, mesh, seed
    if key not in made:
      made[key] = init_params(policy, mesh, seed)
    return jax.tree.map(jnp.copy, made[key])  # an update gives its arguments away

  monkeypatch.setattr(rollouts, 'make_drawer', drawer)
  monkeypatch.setattr(train, 'init_params', params)


@EACH
def test_trains_two_smoke_steps(name, tmp_path, monkeypatch, quick_compiler, shared):
  monkeypatch.setattr(metrics, 'report', lambda workdir: workdir)  # drawing takes as long as a step
  for row in trains(load(name), tmp_path):
    if 'reward' in row:
      found = {key.split('/')[-1] for key in row}  # of a stream, in a weighted sum
      assert found >= OFF_POLICY
      assert 0 <= row.get('effective_sample_size', 1) <= 1 + 1e-6  # 0 if all pairs were ties


@pytest.mark.parametrize('name', HUB)
def test_a_real_model_trains_two_smoke_steps(name, tmp_path, smollm2):
  rows = trains(load(name), tmp_path)
  assert all(r.get('sampler_max_gap', 0) < 1e-3 for r in rows)


def trains(config, tmp_path) -> list[dict]:
  """Runs the last phase, without evaluation; returns the metrics."""
  last = config.order[-1]
  with config.unlocked():
    config.evaluation = part(build.never)
    config.phases = {last: config.phases[last]}
    config.order = (last,)
  state = train.run(config, str(tmp_path))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))
  rows = metrics.read(str(tmp_path / 'metrics.jsonl'))
  assert [r['skipped'] for r in rows] == [0.0] * len(rows)
  assert {r['phase'] for r in rows} == set(config.order)
  assert all(np.isfinite(r['loss']) for r in rows)
  return rows
