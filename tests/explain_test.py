"""`polgrad.explain` lists every knob once, with a flag that works and the documentation of its part."""

import shlex

import pytest

from polgrad import build, cli, explain, overrides
from polgrad.options import from_text
from tests import runs


@pytest.fixture(scope='module')
def config():
  return runs.ppo.get_config('smoke')


def leaves(spec, path='config'):
  """Paths of all values of a configuration that are no names of parts."""
  for key, value in spec.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{path}.{key}')
    elif key != 'name':
      yield f'{path}.{key}'


def test_every_value_of_a_configuration_has_one_flag(config):
  spec = config.to_dict()
  listed = [k.path for part in explain.parts(spec, build.TABLE) for k in part.knobs]
  assert len(listed) == len(set(listed))
  assert set(leaves(spec)) <= set(listed)


def test_the_flags_as_a_shell_reads_them_give_the_same_configuration(config):
  spec = config.to_dict()
  flags = [k.flag for part in explain.parts(spec, build.TABLE) for k in part.knobs]
  _, changes = cli.split_changes(shlex.split(' '.join(flags)))
  assert overrides.apply(config, changes, build.TABLE).to_dict() == spec


def test_most_knobs_are_documented(config):
  knobs = [k for part in explain.parts(config.to_dict(), build.TABLE) for k in part.knobs]
  docs = {k.path: k.doc for k in knobs}
  assert docs['config.phases.train.objective.surrogate.eps_high'] == (
    'Distance of the upper bound from 1.'  # of Args
  )
  assert docs['config.phases.train.epochs'] == 'Passes over a collected batch.'  # of Attributes
  assert docs['config.phases.train.collect.prompts'] == 'Data records of a step.'  # a comment above
  assert docs['config.model.width'] == 'Size of the residual stream'  # a comment behind
  assert sum(map(bool, docs.values())) > 0.9 * len(docs)


def test_changed_knobs_are_marked_and_a_pattern_selects():
  config = from_text('method=dapo,task=addition,model=tiny')
  lines = explain.knob_lines(config.to_dict(), 'eps_(high|low)')
  assert [line for line in lines if line] == [
    'config.phases.train.objective.surrogate.name=surrogates.clipped',
    '  --config.phases.train.objective.surrogate.eps_low=0.2',
    '      Distance of the lower bound from 1.',
    '* --config.phases.train.objective.surrogate.eps_high=0.28  (default 0.2)',
    '      Distance of the upper bound from 1.',
  ]


def test_it_says_what_a_loss_is_made_of_and_who_provides_what(config):
  text = '\n'.join(explain.explain(config, build.build(config)))
  assert 'loss = policy + bonus + value, computed by' in text
  assert 'penalties.value: 0.5 x penalties.clipped_value_error(values, old_values, returns)' in text
  for array, owner in {'advantages': 'credit', 'proximal_logp': 'collect'}.items():
    assert f'{array} {owner}' in ' '.join(text.split()), array
  assert max(map(len, text.splitlines())) <= 130  # flags are not broken


def test_the_loss_of_an_anchor_that_learns_is_listed():
  config = from_text('method=prime,task=addition,model=tiny,smoke')
  text = '\n'.join(explain.explain(config, build.build(config)))
  before, found, after = text.partition('loss of anchor reward_model = ')
  assert found and 'surrogate: surrogates.clipped' in before
  assert 'pointwise.logistic(' in after and 'implicit_rewards.log_ratio_sum(' in after
  assert 'reference_logp anchor reference' in ' '.join(after.split())
  assert 'metrics: reward_model/' in after and 'surrogates.clipped(' not in after
