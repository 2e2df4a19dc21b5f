import dataclasses
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Annotated

import pytest

import polgrad
from polgrad import credit, registry
from polgrad.losses import log_partition
from polgrad.registry import Weighted, bind, call, inputs, part, table, weighted


def hinge(margin, *, threshold=1.0, squared=False):
  return ('hinge', margin, threshold, squared)


def plain(margin):
  return ('plain', margin)


LINKS = table('links', hinge, plain)
LinkPart = Annotated[Callable, LINKS]


def pair(
  *,
  link: LinkPart = hinge,
  steps: int = 3,
  sizes: tuple = (1, 2),
  extra: Mapping[str, LinkPart] = {},
):
  return (link, steps, sizes, extra)


def needy(*, path: str):
  return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  steps: int = 3
  link: LinkPart = hinge
  extra: Mapping[str, LinkPart] = dataclasses.field(default_factory=dict)


FACTORIES = table('made', pair, needy, Settings)
SettingsPart = Annotated[Settings, table('made', Settings)]


def test_part_is_complete_json_and_binds_back():
  spec = part(pair, steps=5, extra={'a': weighted(0.5, part(plain))})
  data = json.loads(spec.to_json())
  assert data['link'] == {'name': 'links.hinge', 'threshold': 1.0, 'squared': False}
  link, steps, sizes, extra = bind(data, FACTORIES)
  assert link(2.0) == ('hinge', 2.0, 1.0, False)
  assert (steps, sizes) == (5, (1, 2))
  assert extra['a'].weight == 0.5 and extra['a'].fn(1) == ('plain', 1)
  assert isinstance(extra['a'], Weighted)


def test_overrides_reach_nested_knobs():
  spec = part(pair)
  spec.link.threshold = 2.5
  assert bind(spec, FACTORIES)[0](0.0) == ('hinge', 0.0, 2.5, False)


def test_int_for_float_knob_is_float_and_can_be_overridden():
  spec = part(hinge, threshold=1)
  spec.threshold = 0.3
  assert bind(spec, LINKS)(0)[2] == 0.3


@pytest.mark.parametrize(
  'spec, error, words',
  [
    ({'name': 'made.pai'}, ValueError, ['config.name', 'made.pai', "did you mean 'made.pair'?"]),
    ({'name': 'made.pair', 'setps': 1}, ValueError, ['setps', "'steps'"]),
    ({'name': 'made.pair', 'steps': 1.5}, TypeError, ['config.steps', 'int', '1.5']),
    ({'name': 'made.pair', 'steps': True}, TypeError, ['config.steps', 'int']),
    (
      {'name': 'made.pair', 'link': {'name': 'links.hinge', 'threshold': 'x'}},
      TypeError,
      ['config.link.threshold', 'float'],
    ),
    (
      {'name': 'made.pair', 'link': {'name': 'no'}},
      ValueError,
      ['config.link.name', "['links.hinge', 'links.plain']"],
    ),
    ({'name': 'made.pair', 'extra': {'k': {'name': 'no'}}}, ValueError, ['config.extra.k.name']),
    (
      {'name': 'made.pair', 'link': 3},
      TypeError,
      ['config.link', "['links.hinge', 'links.plain']"],
    ),
    ({'name': 'made.needy'}, ValueError, ['needy', 'path']),
    ({'name': 'made.needy', 'path': 3}, TypeError, ['config.path', 'str']),
    ({'steps': 3}, TypeError, ['config', 'name']),
    ({'name': ['made.pair']}, ValueError, ['config.name', "['made.pair']"]),
    ({'name': {}}, ValueError, ['config.name']),
    ({'name': 'made.pair', 'weight': 10**400}, ValueError, ['config.weight', 'finite']),
    (
      {'name': 'made.pair', 'link': {'name': 'links.hinge', 'threshold': 10**400}},
      ValueError,
      ['config.link.threshold', 'a float can hold'],
    ),
  ],
)
def test_bad_parts_are_refused_with_field_and_choices(spec, error, words):
  with pytest.raises(error) as caught:
    bind(spec, FACTORIES)
  for word in words:
    assert word in str(caught.value)


def test_part_refuses_unknown_and_missing_knobs():
  with pytest.raises(ValueError, match=r"unknown 'eps'.*'squared', 'threshold'"):
    part(hinge, eps=1)
  with pytest.raises(ValueError, match="needy needs 'path'"):
    part(needy)


def test_inputs_are_positional_names_and_call_supplies_them():
  bound = bind(part(hinge), LINKS)
  assert inputs(hinge) == inputs(bound) == ('margin',)
  assert call(bound, {'margin': 7, 'other': 0})[1] == 7
  with pytest.raises(KeyError, match='margin'):
    call(bound, {'other': 0})


def test_table_refuses_a_name_twice():
  with pytest.raises(ValueError, match=r'links\.hinge'):
    table('links', hinge, hinge)
  with pytest.raises(ValueError, match=r"'other\.hinge'.*'links\.hinge'"):
    table('other', hinge)


def test_knobs_that_parts_use_themselves_are_refused():
  with pytest.raises(ValueError, match='weight'):
    table('links', lambda x, *, weight=0.5: x)


def test_a_function_of_another_module_does_not_become_the_one_of_the_same_name():
  """`log_partition.group_mean` in the slot of an advantage built `advantages.group_mean`."""
  spec = part(credit.outcome, advantage=part(log_partition.group_mean))
  with pytest.raises(
    ValueError, match=r"advantage\.name: unknown 'log_partition\.group_mean'"
  ) as error:
    bind(spec, credit.TABLE)
  assert "did you mean 'advantages.group_mean'" in str(error.value)


def test_every_name_is_what_a_user_writes_before_and_after_the_dot():
  modules = [m.name for m in pkgutil.walk_packages(polgrad.__path__, 'polgrad.')]
  loaded = {name: importlib.import_module(name) for name in modules if '__main__' not in name}
  by_last = {name.rpartition('.')[2]: module for name, module in loaded.items()}
  for fn, name in registry._NAMES.items():
    if fn.__module__.startswith('polgrad.'):
      module, _, function = name.partition('.')
      assert getattr(by_last[module], function) is fn, name


def test_a_dataclass_is_a_part_whose_fields_are_knobs():
  spec = part(Settings, extra={'a': part(plain)})
  data = json.loads(spec.to_json())
  assert data['name'] == 'made.Settings' and data['link']['name'] == 'links.hinge'
  made = bind(data, FACTORIES)
  assert isinstance(made, Settings) and made.steps == 3
  assert made.link(1.0)[0] == 'hinge' and made.extra['a'](1) == ('plain', 1)
  with pytest.raises(ValueError, match="unknown 'stepz'; did you mean 'steps'"):
    part(Settings, stepz=3)


def own(margin, *, scale=2.0):
  return scale * margin


def test_a_function_of_the_users_file_needs_no_registration(tmp_path):
  data = json.loads(part(pair, link=part(own, scale=3.0)).to_json())
  assert data['link']['name'] == f'{pathlib.Path(__file__)}:own'
  assert bind(data, FACTORIES)[0](2.0) == 6.0
  # In another process, such as `evaluate` on the config.json of a run, the file is read again.
  file = tmp_path / 'mine.py'
  file.write_text('def double(margin, *, by: float = 2.0):\n  return by * margin\n')
  data['link'] = {'name': f'{file}:double', 'by': 5}
  assert bind(data, FACTORIES)[0](2.0) == 10.0
  for name, words in [(f'{file}:triple', 'triple'), (f'{file}.no:double', 'does not exist')]:
    with pytest.raises(ValueError, match=words):
      bind({**data, 'link': {'name': name}}, FACTORIES)
  with pytest.raises(ValueError, match='lambda'):
    part(lambda margin: margin)


FILE = """from __future__ import annotations
import dataclasses

@dataclasses.dataclass(frozen=True, kw_only=True)
class Word:
  word: str = 'x'

class Plain:
  word: str = 'x'

class Longer(Word):
  length: int = 3
"""


def test_a_class_of_the_users_file_is_read_or_refused_in_one_line(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(FILE)
  made = part(registry.find(f'{file}:Word', {}, 'option'))
  assert made.to_dict() == {'name': f'{file}:Word', 'word': 'x'}  # although it has no function
  for name in ('Plain', 'Longer'):
    with pytest.raises(TypeError, match=f'{name}: it is no dataclass'):
      part(registry.find(f'{file}:{name}', {}, 'option'))
  for text in ('import nowhere_to_be_found', 'def f(:', '1 / 0'):
    broken = tmp_path / f'broken{len(text)}.py'
    broken.write_text(text)
    with pytest.raises(
      ValueError, match=rf'^option.name: {broken} cannot be imported: \w+Error: .'
    ):
      registry.find(f'{broken}:f', {}, 'option')


def test_what_a_slot_cannot_hold_is_refused():
  with pytest.raises(TypeError, match='config: expected a Settings'):
    registry._bind_part(part(wrong_settings), SettingsPart, 'config')


def wrong_settings(*, steps: int = 1):
  return steps


def test_a_misspelt_array_lists_the_names_and_suggests_one():
  def mine(log_ratio, advantage):
    return log_ratio * advantage

  with pytest.raises(registry.UnknownArray) as error:
    call(mine, {'log_ratio': 1.0, 'advantages': 2.0})
  assert str(error.value) == (
    "mine reads 'advantage', which is not here; did you mean 'advantages'? "
    "valid: ['advantages', 'log_ratio']"
  )
