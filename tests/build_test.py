"""Bad input is refused before anything compiles, with the field and the valid choices."""

import json

import jax
import pytest

from experiments import quickstart
from experiments.policy_gradient import grpo, hpt, ppo
from experiments.preference import dpo
from polgrad import build, collect, credit, models, objectives, optim
from polgrad.data import sources, tokenizers
from polgrad.losses import aggregation, penalties, surrogates
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies


def edit(make, *changes):
  """A smoke configuration with `path = value` changes; a new key unlocks its section."""
  config = make.get_config('smoke')
  for path, value in changes:
    *folders, name = path.split('.')
    section = config
    for folder in folders:
      section = section[folder]
    with section.unlocked():
      section[name] = value
  return config


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
  """A refusal must come before any model work."""

  def refuse(*_, **__):
    raise AssertionError('something was compiled')

  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)


def misspelt(log_ratio, advantage):
  return -log_ratio * advantage


def renamed_streams():
  streams = hpt.get_config('smoke').phases.rl.objective.streams
  return {'sft': streams.demonstration, 'rl': streams.sampled}


CASES = {
  'unknown key': (
    grpo,
    [('phases.rl.setps', 3)],
    ValueError,
    ['config.phases.rl', 'setps', 'steps'],
  ),
  'unknown part': (
    grpo,
    [('phases.rl.objective.surrogate.name', 'cliped')],
    ValueError,
    ['config.phases.rl.objective.surrogate.name', 'cliped', 'clipped', 'reinforce'],
  ),
  'unknown knob': (
    grpo,
    [('phases.rl.objective.surrogate.epsilon', 0.1)],
    ValueError,
    ['config.phases.rl.objective.surrogate', 'epsilon', 'eps_high', 'eps_low'],
  ),
  'nothing to share': (
    dpo,
    [('phases.preference.share_prompts', True)],
    ValueError,
    ['config.phases.preference', 'share_prompts', 'rollouts'],
  ),
  'packed rows with shared prompts': (
    grpo,
    [('phases.rl.share_prompts', True), ('phases.rl.pack', 4)],
    ValueError,
    ['config.phases.rl.pack', 'share_prompts'],
  ),
  'shared groups that minibatches cut': (
    grpo,
    [('phases.rl.share_prompts', True), ('phases.rl.minibatches', 8)],
    ValueError,
    ['config.phases.rl', '8 minibatches', 'groups of 4'],
  ),
  'penalty without a coefficient': (
    grpo,
    [('phases.rl.objective.penalties.kl', part(penalties.k3))],
    TypeError,
    ['penalties.kl', 'weighted('],
  ),
  'weight where one part stands': (
    grpo,
    [('phases.rl.objective.surrogate', weighted(2.0, part(surrogates.clipped)))],
    TypeError,
    ['config.phases.rl.objective.surrogate', 'no weight'],
  ),
  'unknown penalty': (
    grpo,
    [('phases.rl.objective.penalties.kl.name', 'k4')],
    ValueError,
    ['config.phases.rl.objective.penalties.kl.name', 'k4', 'k3'],
  ),
  'order without its phase': (
    grpo,
    [('order', ('sft', 'dpo'))],
    ValueError,
    ['config.order', "['rl', 'sft']"],
  ),
  'prompt and completion longer than the context': (
    grpo,
    [('phases.rl.collect.max_new_tokens', 100)],
    ValueError,
    ['config.phases.rl.collect', '106', 'config.model.max_length', '64'],
  ),
  'vocabulary smaller than the tokenizer': (
    grpo,
    [('model.vocab_size', 9)],
    ValueError,
    ['config.model', 'vocab_size 9', 'config.tokenizer, 14'],
  ),
  'reference that is not there': (
    grpo,
    [('phases.rl.anchors', {})],
    ValueError,
    ['config.phases.rl.anchors', 'reference_logp', "'reference'"],
  ),
  'values without a head': (
    ppo,
    [('model.value_head', False)],
    ValueError,
    ['config.phases.rl', 'config.model.value_head'],
  ),
  'advantages that nobody makes': (
    grpo,
    [('phases.rl.credit', part(credit.nothing))],
    ValueError,
    ['config.phases.rl.objective.surrogate', "clipped reads 'advantages'", 'credit'],
  ),
  'misspelt array': (
    grpo,
    [('phases.rl.objective.surrogate', part(misspelt))],
    ValueError,
    [
      "config.phases.rl.objective.surrogate: misspelt reads 'advantage'",
      "did you mean 'advantages'?",
      "'log_ratio', 'logp'",
    ],
  ),
  'streams of a mixed batch that are renamed': (
    hpt,
    [('phases.rl.objective.streams', renamed_streams())],
    ValueError,
    ['config.phases.rl.objective.streams', "['rl', 'sft']", "['demonstration', 'sampled']"],
  ),
  'labels that nobody makes': (
    grpo,
    [('phases.rl.objective', dpo.get_config('smoke').phases.preference.objective)],
    ValueError,
    ['config.phases.rl', "['label']"],
  ),
  'minibatches that do not divide': (
    grpo,
    [('phases.rl.minibatches', 3)],
    ValueError,
    ['config.phases.rl', '16 rows', '3 minibatches'],
  ),
  'mesh that is too large': (grpo, [('mesh.data', 16)], ValueError, ['data=16', '8 devices']),
  'rows that the mesh cannot cut': (
    grpo,
    [('mesh.data', 8)],
    ValueError,
    ['config.phases.rl.collect', '4 records', '8 devices'],
  ),
  'bad operator': (
    grpo,
    [('phases.rl.source.operator', '/')],
    ValueError,
    ["'/'", "'+'"],
  ),
  'source file that is missing': (
    grpo,
    [('phases.rl.source', part(sources.jsonl, path='/nowhere/data.jsonl'))],
    FileNotFoundError,
    ['/nowhere/data.jsonl'],
  ),
  'tokenizer file that is missing': (
    grpo,
    [('tokenizer', part(tokenizers.huggingface, path='/nowhere'))],
    FileNotFoundError,
    ['/nowhere/tokenizer.json'],
  ),
  'model folder that is missing': (
    grpo,
    [('model', part(models.pretrained, path='/nowhere'))],
    FileNotFoundError,
    ['/nowhere'],
  ),
  'anchor of a frozen model that is not there': (
    grpo,
    [('phases.rl.frozen', {'teacher': grpo.get_config('smoke').model})],
    ValueError,
    ['config.phases.rl.frozen', "'teacher'", "['reference']"],
  ),
  'behavior_policy without its anchor': (
    quickstart,
    [('phases.grpo.collect.behavior_policy', part(behavior_policies.geometric_mixture))],
    ValueError,
    ['config.phases.grpo.anchors', "'reference'"],
  ),
  'pairs cut through': (
    dpo,
    [('phases.preference.minibatches', 8)],
    ValueError,
    ['config.phases.preference', '8 minibatches', 'groups of 2'],
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_is_refused(case):
  make, changes, error, words = CASES[case]
  with pytest.raises(error) as caught:
    build.build(edit(make, *changes))
  for word in words:
    assert word in str(caught.value), str(caught.value)


def test_wrong_types_are_refused_by_the_config_itself():
  config = grpo.get_config('smoke')
  with pytest.raises(TypeError):
    config.phases.rl.steps = 0.5
  data = json.loads(config.to_json())
  data['phases']['rl']['objective']['surrogate']['eps_low'] = 'small'
  with pytest.raises(TypeError, match=r'config\.phases\.rl\.objective\.surrogate\.eps_low.*float'):
    build.build(data)


@pytest.mark.parametrize(
  'change', [('top_k', 5), ('top_p', 0.9), ('behavior_policy', part(behavior_policies.greedy))]
)
def test_trap_07_filtered_sampling_is_refused_unless_the_trainer_recomputes(change):
  name, value = change
  broken = edit(grpo, (f'phases.rl.collect.{name}', value))
  with pytest.raises(ValueError, match='recompute_proximal=True'):
    build.build(broken)
  broken.phases.rl.collect.recompute_proximal = True
  build.build(broken)


def test_options_of_an_experiment():
  assert grpo.get_config('group=4,steps=7').phases.rl.collect.samples_per_prompt == 4
  assert grpo.get_config('steps=7').phases.rl.steps == 7
  with pytest.raises(
    ValueError, match=r"unknown option 'gruop'; valid: \['group', 'smoke', 'steps'\]"
  ):
    grpo.get_config('gruop=4')
  with pytest.raises(ValueError, match="option group: expected int, got 'four'"):
    grpo.get_config('group=four')


def test_a_new_idea_is_a_pure_function_in_one_slot():
  """A user's surrogate needs no registration: it is named in a configuration and built."""

  def squashed(log_ratio, advantages, *, slope=1.0):
    return -advantages * jax.nn.tanh(slope * log_ratio) / slope

  own = part(
    objectives.PolicyGradient,
    surrogate=part(squashed, slope=2.0),
    aggregation=part(aggregation.token_mean),
  )
  made = build.build(edit(grpo, ('phases.rl.objective', own))).phases['rl'].objective
  assert made.requires == {'advantages', 'proximal_logp'}


def test_requirements_decide_what_is_collected():
  run = build.build(ppo.get_config('smoke'))
  assert run.phases['rl'].objective.requires == {
    'advantages', 'entropy', 'old_values', 'proximal_logp', 'returns', 'values',
  }  # fmt: skip
  assert isinstance(run.phases['rl'].collect, collect.Collector)
  assert run.phases['rl'].credit.provides == {'advantages', 'returns'}
  assert optim.ANCHORS.keys() == {'optim.fixed', 'optim.ema', 'optim.sync'}
