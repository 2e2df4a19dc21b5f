"""What docs/curricula.md shows works as written."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest

from polgrad import build, cli, curricula
from polgrad.curricula.base import Request
from polgrad.options import from_text
from polgrad.overrides import apply
from tests.curricula_test import seen

PAGE = (pathlib.Path(__file__).parent.parent / 'docs/curricula.md').read_text()
COMMANDS = re.findall(r'^python -m polgrad.train (.*)$', PAGE.replace('\\\n', ''), re.MULTILINE)
[MINE] = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
[RECORD] = re.findall(r'```json\n(.*?)\n```', PAGE, re.DOTALL)


@pytest.mark.parametrize('command', COMMANDS, ids=lambda x: re.search(r'=runs/(\w+)', x)[1])
def test_the_commands_compose(command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  records = [json.loads(RECORD) | {'level': i % 3} for i in range(20)]
  pathlib.Path('answers.jsonl').write_text('\n'.join(map(json.dumps, records)))
  pathlib.Path('mine.py').write_text(MINE)
  [config, *_], changes = cli.split_changes(shlex.split(command))
  made = apply(from_text(config.partition('run.py:')[2]), changes, build.TABLE)
  made.mesh.data = 1
  phase = build.build(made).phases['train']
  source = phase.source
  asked = Request(count=4, size=len(source), cursor=0, seed=0, records=source)
  assert len(phase.curriculum.propose(phase.curriculum.init(phase.source), asked)) == 4


def test_every_curriculum_is_in_the_table_and_has_a_command():
  # Tables of measurements have rows that are none of them.
  measured = re.compile('<!-- (table|lengths|hints|revisions) -->.*?<!-- end.*? -->', re.DOTALL)
  named = {*re.findall(r'^\| `(\w+)`', measured.sub('', PAGE), re.MULTILINE)}
  assert {f'curricula.{name}' for name in named} == curricula.TABLE.keys()
  shown = {*re.findall(r'curriculum=(\w+)[,\s]', ' '.join(COMMANDS))} | {'spo'}  # by its method
  assert named - shown == {'epochs', 'uniform'}


def test_the_one_of_your_own_draws_what_fails():
  names = {}
  exec(compile(MINE, 'mine.py', 'exec'), names)
  one = names['hardest']()
  state = one.update(one.init([{}] * 5), seen([0, 1, 2, 4], [1, 1, 0, 1]))
  assert {*one.propose(np.asarray(state), Request(2, 5, 0, 0)).tolist()} == {2, 3}


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('method=grpo,task=addition,model=tiny,curriculum=vada', "did you mean 'curricula.vade'"),
    ('method=grpo,task=addition,model=tiny,curriculum.decay=1', 'name it with curriculum='),
    (
      'method=grpo,task=addition,model=tiny,curriculum=vade,curriculum.term=exakt',
      "curriculum.term: 'exakt' is no term of the reward; did you mean 'exact'",
    ),
    ('method=dpo,task=addition,model=tiny,curriculum=vade', 'this phase samples none'),
    ('method=remix,task=addition,model=tiny,curriculum=sec', 'with collect.replay a step trains'),
    ('method=online_dpo,task=addition,model=tiny,curriculum=sec', 'makes none'),
    ('method=remix,task=addition,model=tiny,curriculum=budget', 'with collect.replay a group may'),
  ],
)
def test_what_cannot_be_learned_from_is_refused(text, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    config = from_text(text)
    config.mesh.data = 1
    build.build(config)


def test_pooled_groups_that_an_objective_compares_are_in_one_piece():
  config = from_text('method=nca,sampled,task=addition,model=tiny,curriculum=budget')
  config.mesh.data = 1
  config.phases.train.update(minibatches=1, micro_batches=1)
  build.build(config)
  config.phases.train.minibatches = 2
  with pytest.raises(ValueError, match='pooled groups may be cut; take minibatches=1'):
    build.build(config)


def test_records_without_the_field_are_refused_before_the_run():
  config = from_text('method=grpo,task=addition,model=tiny,curriculum=sec')
  config.mesh.data = 1
  with pytest.raises(ValueError, match=r"train\.curriculum: record 0: no field 'category'"):
    build.check_data(build.build(config))
