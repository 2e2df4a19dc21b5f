"""The runs of `benchmarks.kills` have what they are named for, and a save is told from a leftover."""

import ast
import pathlib

import pytest

from benchmarks import kills
from polgrad.build import build


@pytest.mark.parametrize('name', [name for name in kills.RUNS if name != 'distributed'])
def test_a_run_saves_after_every_step(name):
  run = build(kills.get_config(name))
  assert run.checkpoint_every == 1
  assert sum(phase.steps for phase in run.phases.values()) >= 8


def test_a_config_file_imports_no_main_whose_flags_would_be_defined_twice():
  for file in pathlib.Path(kills.__file__).parents[1].glob('*/*.py'):
    tree = ast.parse(file.read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if file.parent.name not in ('benchmarks', 'experiments') or 'get_config' not in functions:
      continue
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if node.module == 'polgrad' for alias in node.names}
    assert not names & {'train', 'evaluate', 'sample', 'check', 'verify'}, file


def test_each_run_has_what_it_is_named_for():
  made = {name: build(kills.get_config(name)) for name in kills.RUNS if name != 'distributed'}
  assert len(made['phases'].phases) == 2
  assert made['replay'].phases['train'].collect.lag == 1
  assert made['episodes'].phases['train'].collect.overlap
  assert not made['interrupted'].phases['train'].collect.refill
  assert made['adaptive'].phases['train'].objective.init()
  assert made['lora'].policy.config.lora_rank == 4
  assert made['experts'].policy.config.num_experts == 4
  assert kills.get_config('distributed').mesh.fsdp == 2


def test_a_leftover_of_an_earlier_kill_is_no_save(tmp_path):
  trial = kills.Trial('lora', tmp_path, '')
  (tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp').mkdir(parents=True)
  trial.left, trial.mark[0] = trial.temporary(), kills.STEP
  assert len(trial.left) == 1 and not trial.saving()
  (tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp').mkdir()
  assert trial.saving()
  trial.mark[0] = kills.BEGIN
  assert not trial.saving()
