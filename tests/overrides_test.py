"""Changes of a configuration by the command line: values, exchanged parts, and what is refused."""

import pathlib
import re
import sys

import pytest
from absl.testing import flagsaver

from polgrad import build, cli, identity
from polgrad.options import from_text
from polgrad.overrides import apply
from tests import hub
from tests.runs import grpo

ROOT = pathlib.Path(__file__).parents[1]

OWN = """
def own(completion, record, *, bonus=0.5):
  return bonus
"""


@pytest.fixture(scope='module')
def config():
  return grpo.get_config('smoke')


def changed(config, **changes):
  """The configuration with changes below the phase; `__` stands for a dot."""
  paths = {f'config.phases.train.{k.replace("__", ".")}': v for k, v in changes.items()}
  return apply(config, paths, build.TABLE)


def test_values_are_read_as_the_knob_wants_them(config):
  made = changed(
    config,
    steps='7',
    optimizer__learning_rate='1',
    shuffle='false',
    source__split='heldout',
    reward__exact__weight='2',
  )
  phase = made.phases.train
  rate, weight = phase.optimizer.learning_rate, phase.reward.exact.weight
  found = phase.steps, rate, phase.shuffle, phase.source.split, weight
  assert found == (7, 1, False, 'heldout', 2)
  assert type(rate) is float and type(weight) is float
  made = apply(config, {'config.order': "['train']", 'config.seed': '3'}, build.TABLE)
  assert made.order == ('train',) and made.seed == 3
  before = grpo.get_config('smoke')
  assert config.to_json() == before.to_json()  # the first is as it was


def test_options_of_a_chat_template_are_given_by_name(tmp_path):
  path = hub.published('qwen3', tmp_path)
  text = f'method=grpo,task=chain_sum,model=qwen3,path={path},smoke'
  short = from_text(f'{text},template.enable_thinking=false,template.style=terse')
  paths = {'enable_thinking': 'False', 'style': 'terse'}
  paths = {f'config.tokenizer.template_options.{name}': value for name, value in paths.items()}
  assert apply(from_text(text), paths, build.TABLE).to_dict() == short.to_dict()
  assert short.tokenizer.template_options.to_dict() == {'enable_thinking': False, 'style': 'terse'}
  with pytest.raises(
    ValueError, match=r'enable_thinking: the chat template of .* does not read it'
  ):
    build.build(short)
  found = identity.differences(*(identity.describe(one) for one in (from_text(text), short)))
  assert any('template_options' in line for line in found)
  with pytest.raises(ValueError, match=r"\['a'\] of the template: the model has no chat template"):
    from_text('method=grpo,task=addition,model=tiny,template.a=1')


def test_a_part_is_exchanged_with_knobs_of_its_own(config):
  made = changed(config, optimizer__schedule__steps='100', optimizer__schedule__name='cosine')
  schedule = made.phases.train.optimizer.schedule.to_dict()
  assert schedule == {'name': 'optim.cosine', 'steps': 100, 'warmup': 0, 'end': 0.0}
  build.build(made)


def test_knobs_that_both_parts_have_keep_their_values(config):
  made = changed(config, optimizer__name='sgd', optimizer__momentum='0.9')
  before, after = config.phases.train.optimizer, made.phases.train.optimizer
  assert after.name == 'optim.sgd' and after.momentum == 0.9
  assert 'b1' not in after
  same = ('learning_rate', 'max_grad_norm', 'schedule', 'master_weights')
  assert all(after[k] == before[k] for k in same)
  given = changed(config, optimizer__name='optim.sgd', optimizer__learning_rate='0.5')
  assert given.phases.train.optimizer.learning_rate == 0.5
  # A value that is not among the choices of the new part is not kept.
  engine = {'config.engine.name': 'Vllm', 'config.engine.python': 'python'}
  assert config.engine.dtype == ''
  assert apply(config, engine, build.TABLE).engine.dtype == 'float32'
  whole = changed(config, collect__name='Explored', collect__rounds='2')
  assert whole.phases.train.collect.prompts == config.phases.train.collect.prompts
  build.build(whole)


def test_the_name_that_a_part_has_already_changes_nothing(config):
  made = changed(config, objective__surrogate__name='clipped', optimizer__name='optim.adamw')
  assert made == config


def test_parts_within_an_exchanged_part_are_exchanged_too(config):
  made = changed(
    config,
    optimizer__schedule__warmup='5',
    optimizer__schedule__steps='50',
    optimizer__schedule__name='linear',
    optimizer__name='sgd',
  )
  optimizer = made.phases.train.optimizer
  assert (optimizer.name, optimizer.schedule.name) == ('optim.sgd', 'optim.linear')
  assert (optimizer.schedule.warmup, optimizer.schedule.steps) == (5, 50)
  # A knob of the new part may be a part that it cannot do without.
  nested = changed(config, source__name='as_chat', source__source__name='arithmetic')
  assert nested.phases.train.source.source.name == 'sources.arithmetic'
  nested = changed(
    config, source__name='fraction', source__source__name='jsonl', source__source__path='a'
  )
  assert nested.phases.train.source.source.path == 'a'


def test_a_weight_stays_and_a_part_may_be_added_where_there_are_several(config):
  made = changed(
    config,
    objective__penalties__kl__name='k2',
    objective__penalties__more__name='k1',
    objective__penalties__more__weight='0.1',
    anchors__old__name='ema',
    anchors__old__decay='0.5',
  )
  penalties = made.phases.train.objective.penalties
  assert penalties.kl.to_dict() == {'name': 'penalties.k2', 'weight': 0.04}
  assert penalties.more.to_dict() == {'name': 'penalties.k1', 'weight': 0.1}
  assert made.phases.train.anchors.old.decay == 0.5
  build.build(made)


def test_a_function_of_a_file_may_take_the_place_of_a_part(config, tmp_path):
  (tmp_path / 'own.py').write_text(OWN)
  name = f'{tmp_path}/own.py:own'
  made = changed(config, reward__exact__name=name, reward__exact__bonus='0.25')
  assert made.phases.train.reward.exact.to_dict() == {'name': name, 'bonus': 0.25, 'weight': 1.0}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'optimizer__lr': '1'}, "train.optimizer: optim.adamw has no 'lr'; valid: ['b1'"),
    ({'optimizer__weight': '1'}, "optim.adamw has no 'weight'"),
    ({'optimiser__b1': '1'}, "has no 'optimiser'; did you mean 'optimizer'?"),
    ({'optimizer__schedule__name': 'cosin'}, "name: unknown 'cosin'; did you mean 'optim.cosine'?"),
    ({'optimizer__schedule__name': 'cosine'}, "optim.cosine needs 'steps'; give --config.phases.tr"),
    ({'optimizer__schedule': 'cosine'}, 'name the part by config.phases.train.optimizer.schedule.na'),
    ({'reward': '1'}, 'name the part by config.phases.train.reward.NAME.name=...; valid: ['),
    ({'reward__exakt__strip': '1'}, "reward: unknown 'exakt'; did you mean 'exact'?"),
    ({'optimizer__b1__x': '1'}, 'optimizer.b1 is the value 0.9, there is nothing in it'),
    ({'optimizer__b1': 'x'}, "optimizer.b1: expected float, got 'x'"),
    ({'shuffle': 'x'}, "train.shuffle: expected bool, got 'x'"),
    ({'steps': '1.5'}, "train.steps: expected int, got '1.5'"),
    ({'source__name': 'as_chat'}, "sources.as_chat needs 'source'; give --config.phases.train.source.s"),
    # Knobs of the part that was there are none of the new one.
    ({'optimizer__name': 'sgd', 'optimizer__b1': '0.5'}, "optim.sgd has no 'b1'; valid: ['learning_"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_path_and_what_is_valid(config, changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    changed(config, **changes)


@pytest.mark.parametrize('path', ['config.seed.x', 'config.6', 'config.nothing', 'config.'])
def test_an_override_of_no_value_is_refused_with_its_path(config, path):
  _, changes = cli.split_changes([f'--{path}=1'])
  key = path.rpartition('.')[2]
  words = rf"config\.seed\.x: .*nothing in it|config: build\.Experiment has no '{key}'; .*valid"
  with pytest.raises(ValueError, match=words):
    apply(config, changes, build.TABLE)


def test_changes_are_taken_from_the_arguments_in_every_form():
  given = ['main', '--config=a.py:b=1', '--config.a.b=x=1', '-config.c', '2', '--config.on']
  given += ['--noconfig.off', '--workdir=w', '--config.neg=-1', '--config.a.b=last']
  rest, changes = cli.split_changes(given)
  assert rest == ['main', '--config=a.py:b=1', '--workdir=w']
  assert changes == {
    'config.a.b': 'last',
    'config.c': '2',
    'config.on': 'true',
    'config.off': 'false',
    'config.neg': '-1',
  }


@pytest.mark.parametrize(
  ('file', 'said'),
  [
    (
      'experiments/run.py:method=grpoo,task=addition,model=tiny',
      "unknown 'grpoo'; did you mean 'grpo'?",
    ),
    (
      'experiments/run.py:method=sft,task=jsonl,data=/no.jsonl,model=tiny',
      '/no.jsonl: expected a file of JSON lines, there is none',
    ),
    ('no.py', "FileNotFoundError: --config: there is no file 'no.py'\n"),
  ],
)
def test_what_a_config_file_raises_is_one_line_of_the_mains(file, said, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', list(sys.argv))
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.chdir(ROOT)
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
    cli._parse(['train', f'--config={file}', '--workdir=unused'])
    cli.start(['train'])
  told = capsys.readouterr().err
  assert ended.value.code == 2 and said in told
  assert 'Traceback' not in told and 'earlier failure' not in told


def test_the_checkpoints_of_a_run_in_a_bucket_are_there_or_where_the_flag_says():
  with flagsaver.flagsaver():
    cli._parse(['train', '--workdir=gs://bucket/run'])
    assert cli.checkpoint_folder() == 'gs://bucket/run/checkpoints'
    cli._parse(['train', '--checkpoints=s3://other/run'])
    assert cli.checkpoint_folder() == 's3://other/run'
    for text in ('gs:/bucket/run', 'gs:bucket/run'):
      cli._parse(['train', f'--workdir={text}', '--checkpoints='])
      with pytest.raises(ValueError, match=f'--workdir={text}: .* as gs://bucket/run'):
        cli.checkpoint_folder()
