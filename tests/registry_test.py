import json
from collections.abc import Callable, Mapping
from typing import Annotated

import pytest

from polgrad import registry
from polgrad.registry import Weighted, bind, call, inputs, part, table, weighted


def hinge(margin, *, threshold=1.0, squared=False):
  return ('hinge', margin, threshold, squared)


def plain(margin):
  return ('plain', margin)


LINKS = table(hinge, plain)
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


FACTORIES = table(pair, needy)


def test_part_is_complete_json_and_binds_back():
  spec = part(pair, steps=5, extra={'a': weighted(0.5, part(plain))})
  data = json.loads(spec.to_json())
  assert data['link'] == {'name': 'hinge', 'threshold': 1.0, 'squared': False}
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
    ({'name': 'hing'}, ValueError, ['config.name', 'hing', "['needy', 'pair']"]),
    ({'name': 'pair', 'setps': 1}, ValueError, ['setps', "'steps'"]),
    ({'name': 'pair', 'steps': 1.5}, TypeError, ['config.steps', 'int', '1.5']),
    ({'name': 'pair', 'steps': True}, TypeError, ['config.steps', 'int']),
    (
      {'name': 'pair', 'link': {'name': 'hinge', 'threshold': 'x'}},
      TypeError,
      ['config.link.threshold', 'float'],
    ),
    (
      {'name': 'pair', 'link': {'name': 'no'}},
      ValueError,
      ['config.link.name', "['hinge', 'plain']"],
    ),
    ({'name': 'pair', 'extra': {'k': {'name': 'no'}}}, ValueError, ['config.extra.k.name']),
    ({'name': 'pair', 'link': 3}, TypeError, ['config.link', "['hinge', 'plain']"]),
    ({'name': 'needy'}, ValueError, ['needy', 'path']),
    ({'name': 'needy', 'path': 3}, TypeError, ['config.path', 'str']),
    ({'steps': 3}, TypeError, ['config', 'name']),
  ],
)
def test_bad_parts_are_refused_with_field_and_choices(spec, error, words):
  with pytest.raises(error) as caught:
    bind(spec, FACTORIES)
  for word in words:
    assert word in str(caught.value)


def test_part_refuses_unknown_and_missing_knobs():
  with pytest.raises(ValueError, match=r"unknown \['eps'\].*'squared', 'threshold'"):
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
  with pytest.raises(ValueError, match='twice'):
    table(hinge, hinge)


def test_register_adds_own_functions_but_hides_none_of_ours():
  choices = dict(LINKS)
  mine = registry.register(choices, lambda margin: margin)
  assert choices['<lambda>'] is mine
  from polgrad.losses import surrogates

  def clipped(log_ratio, advantages):
    return log_ratio

  with pytest.raises(ValueError, match=r'polgrad\.losses\.surrogates'):
    registry.register(dict(surrogates.TABLE), clipped)


def test_knobs_that_parts_use_themselves_are_refused():
  with pytest.raises(ValueError, match='weight'):
    table(lambda x, *, weight=0.5: x)
