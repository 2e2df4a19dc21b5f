"""Bad input is refused before anything compiles, with the field and the valid choices."""

import json
import re

import jax
import pytest

from experiments import quickstart
from polgrad import build, collect, credit, models, objectives, optim
from polgrad.data import sources, tokenizers
from polgrad.losses import aggregation, penalties, surrogates
from polgrad.options import from_text
from polgrad.registry import part, weighted
from polgrad.rewards import comparisons
from polgrad.sampling import behavior_policies
from tests.runs import dpo, grpo, hpt, ppo


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
  streams = hpt.get_config('smoke').phases.train.objective.streams
  return {'sft': streams.demonstration, 'rl': streams.sampled}


CASES = {
  'group of one': (
    grpo,
    [('phases.train.collect.samples_per_prompt', 1)],
    ValueError,
    ['config.phases.train.collect.samples_per_prompt: 1', 'would be 0', 'at least 2', 'ppo'],
  ),
  'unknown key': (
    grpo,
    [('phases.train.setps', 3)],
    ValueError,
    ['config.phases.train', 'setps', 'steps'],
  ),
  'unknown part': (
    grpo,
    [('phases.train.objective.surrogate.name', 'cliped')],
    ValueError,
    ['config.phases.train.objective.surrogate.name', 'cliped', 'clipped', 'reinforce'],
  ),
  'unknown knob': (
    grpo,
    [('phases.train.objective.surrogate.epsilon', 0.1)],
    ValueError,
    ['config.phases.train.objective.surrogate', 'epsilon', 'eps_high', 'eps_low'],
  ),
  'an order of no names': (
    grpo,
    [('order', [['train'], 'warm_start'])],
    ValueError,
    ['config.order', "['train', 'warm_start']"],
  ),
  'too many digits': (
    grpo,
    [('phases.train.source.digits', 13)],
    ValueError,
    ['config.phases.train.source', 'digits 13 must be from 1 to 9'],
  ),
  'nothing to share': (
    dpo,
    [('phases.train.share_prompts', True)],
    ValueError,
    ['config.phases.train', 'share_prompts', 'rollouts'],
  ),
  'packed rows with shared prompts': (
    grpo,
    [('phases.train.share_prompts', True), ('phases.train.pack', 4)],
    ValueError,
    ['config.phases.train.pack', 'share_prompts'],
  ),
  'shared groups that minibatches cut': (
    grpo,
    [('phases.train.share_prompts', True), ('phases.train.minibatches', 8)],
    ValueError,
    ['config.phases.train', '8 minibatches', 'groups of 4'],
  ),
  'penalty without a coefficient': (
    grpo,
    [('phases.train.objective.penalties.kl', part(penalties.k3))],
    TypeError,
    ['penalties.kl', 'weighted('],
  ),
  'weight where one part stands': (
    grpo,
    [('phases.train.objective.surrogate', weighted(2.0, part(surrogates.clipped)))],
    TypeError,
    ['config.phases.train.objective.surrogate', 'no weight'],
  ),
  'unknown penalty': (
    grpo,
    [('phases.train.objective.penalties.kl.name', 'k4')],
    ValueError,
    ['config.phases.train.objective.penalties.kl.name', 'k4', 'k3'],
  ),
  'order without its phase': (
    grpo,
    [('order', ('sft', 'dpo'))],
    ValueError,
    ['config.order', "['train', 'warm_start']"],
  ),
  'prompt and completion longer than the context': (
    grpo,
    [('phases.train.collect.max_new_tokens', 100)],
    ValueError,
    ['config.phases.train.collect', '106', 'config.model.max_length', '64'],
  ),
  'vocabulary smaller than the tokenizer': (
    grpo,
    [('model.vocab_size', 9)],
    ValueError,
    ['config.model', 'vocab_size 9', 'config.tokenizer, 14'],
  ),
  'reference that is not there': (
    grpo,
    [('phases.train.anchors', {})],
    ValueError,
    ['config.phases.train.anchors', 'reference_logp', "'reference'"],
  ),
  'values without a head': (
    ppo,
    [('model.value_head', False)],
    ValueError,
    ['config.phases.train', 'config.model.value_head'],
  ),
  'advantages that nobody makes': (
    grpo,
    [('phases.train.credit', part(credit.nothing))],
    ValueError,
    ['config.phases.train.objective.surrogate', "clipped reads 'advantages'", 'credit'],
  ),
  'misspelt array': (
    grpo,
    [('phases.train.objective.surrogate', part(misspelt))],
    ValueError,
    [
      "config.phases.train.objective.surrogate: misspelt reads 'advantage'",
      "did you mean 'advantages'?",
      "'log_ratio', 'logp'",
    ],
  ),
  'streams of a mixed batch that are renamed': (
    hpt,
    [('phases.train.objective.streams', renamed_streams())],
    ValueError,
    ['config.phases.train.objective.streams', "['rl', 'sft']", "['demonstration', 'sampled']"],
  ),
  'labels that nobody makes': (
    grpo,
    [('phases.train.objective', dpo.get_config('smoke').phases.train.objective)],
    ValueError,
    ['config.phases.train', "['label']"],
  ),
  'minibatches that do not divide': (
    grpo,
    [('phases.train.minibatches', 3)],
    ValueError,
    ['config.phases.train', '16 rows', '3 minibatches'],
  ),
  'mesh that is too large': (grpo, [('mesh.data', 16)], ValueError, ['data=16', '8 devices']),
  'rows that the mesh cannot cut': (
    grpo,
    [('mesh.data', 8)],
    ValueError,
    ['config.phases.train.collect', '4 records', '8 devices'],
  ),
  'bad operator': (
    grpo,
    [('phases.train.source.operator', '/')],
    ValueError,
    ["'/'", "'+'"],
  ),
  'source file that is missing': (
    grpo,
    [('phases.train.source', part(sources.jsonl, path='/nowhere/data.jsonl'))],
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
    [('phases.train.frozen', {'teacher': grpo.get_config('smoke').model})],
    ValueError,
    ['config.phases.train.frozen', "'teacher'", "['reference']"],
  ),
  'behavior_policy without its anchor': (
    quickstart,
    [('phases.train.collect.behavior_policy', part(behavior_policies.geometric_mixture))],
    ValueError,
    ['config.phases.train.anchors', "'reference'"],
  ),
  'a kernel of other devices': (
    grpo,
    [('model.attention', 'splash')],
    ValueError,
    ['config.model.attention', "'splash' runs on a tpu, the devices here are cpu", "['einsum']"],
  ),
  'rows that do not divide over context': (
    grpo,
    [('mesh.context', 2)],
    ValueError,
    ['config.phases.train.collect: rows of 11 tokens', 'config.mesh.context=2'],
  ),
  'rows that do not divide over an axis that cuts them too': (
    grpo,
    [('mesh.data', 1), ('mesh.expert', 3)],
    ValueError,
    ['16 rows do not divide', '3 devices (config.mesh.expert=3)'],
  ),
  'experts that do not divide': (
    dpo,
    [('mesh.expert', 4), ('model.num_experts', 6)],
    ValueError,
    ['config.mesh: expert=4 does not divide the 6 experts of config.model'],
  ),
  'a rule of an unknown axis': (
    dpo,
    [('mesh.rules', {'embedding': 'fsdp'})],
    ValueError,
    ['config.mesh: rules: unknown logical axis', "'embedding'"],
  ),
  'pairs cut through': (
    dpo,
    [('phases.train.minibatches', 8)],
    ValueError,
    ['config.phases.train', '8 minibatches', 'groups of 2'],
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
    config.phases.train.steps = 0.5
  data = json.loads(config.to_json())
  data['phases']['train']['objective']['surrogate']['eps_low'] = 'small'
  with pytest.raises(
    TypeError, match=r'config\.phases\.train\.objective\.surrogate\.eps_low.*float'
  ):
    build.build(data)


@pytest.mark.parametrize(
  'change', [('top_k', 5), ('top_p', 0.9), ('behavior_policy', part(behavior_policies.greedy))]
)
def test_filtered_sampling_is_refused_unless_the_trainer_recomputes(change):
  name, value = change
  broken = edit(grpo, (f'phases.train.collect.{name}', value))
  with pytest.raises(ValueError, match='recompute_proximal=True'):
    build.build(broken)
  broken.phases.train.collect.recompute_proximal = True
  build.build(broken)


def test_options_of_a_named_run():
  assert quickstart.get_config('seed=4,steps=7').phases.train.steps == 7
  with pytest.raises(ValueError, match=r"unknown option 'sead'; did you mean 'seed'\? valid: "):
    quickstart.get_config('sead=4')
  with pytest.raises(ValueError, match="option seed: expected int, got 'four'"):
    quickstart.get_config('seed=four')


def test_a_new_idea_is_a_pure_function_in_one_slot():
  """A user's surrogate needs no registration: it is named in a configuration and built."""

  def squashed(log_ratio, advantages, *, slope=1.0):
    return -advantages * jax.nn.tanh(slope * log_ratio) / slope

  own = part(
    objectives.PolicyGradient,
    surrogate=part(squashed, slope=2.0),
    aggregation=part(aggregation.token_mean),
  )
  made = build.build(edit(grpo, ('phases.train.objective', own))).phases['train'].objective
  assert made.requires == {'advantages', 'proximal_logp'}


def test_requirements_decide_what_is_collected():
  run = build.build(ppo.get_config('smoke'))
  assert run.phases['train'].objective.requires == {
    'advantages', 'entropy', 'old_values', 'proximal_logp', 'returns', 'values',
  }  # fmt: skip
  assert isinstance(run.phases['train'].collect, collect.Collector)
  assert run.phases['train'].credit.provides == {'advantages', 'returns'}
  assert {'optim.fixed', 'optim.ema', 'optim.sync'} <= optim.ANCHORS.keys()


EMPTY_GAP = part(collect.picks.best_worst, min_gap=2.0, max_gap=1.0)


@pytest.mark.parametrize(
  ('method', 'changes', 'words'),
  [
    ('online_dpo', {'collect.samples_per_prompt': 1}, 'collect: groups of 1 rows, but the .* 2'),
    ('online_dpo', {'collect.samples_per_prompt': 3}, 'collect: groups of 3 rows, but the .* 2'),
    ('infonca,sampled=true', {'collect.samples_per_prompt': 1}, 'collect: groups of 1 rows'),
    ('online_dpo', {'comparison': part(comparisons.shorter)}, 'comparison: nothing reads it; name'),
    ('dpo', {'objective.beta': -1.0}, 'objective.beta: expected a number above 0'),
    ('online_dpo', {'collect.choose': EMPTY_GAP}, 'collect: best_worst: min_gap=2.0 must be below'),
    ('dpo', {'comparison': part(comparisons.shorter)}, 'comparison: nothing reads it; name'),
  ],
)
def test_what_cannot_teach_pairs_is_refused(method, changes, words):
  config = from_text(f'method={method},task=addition,model=tiny,smoke')
  for path, value in changes.items():
    section, _, name = path.rpartition('.')
    (config.phases.train[section] if section else config.phases.train)[name] = value
  with pytest.raises(ValueError, match=rf'config\.phases\.train\.{words}'):
    build.build(config)


BOUNDED = {  # what no run can have, and the range that the error names
  'seed': (-1, 'at least 0'),
  'keep_checkpoints': (0, 'at least 1'),
  'max_skipped': (0, 'at least 1'),
  'evaluation.problems': (0, 'at least 1'),
  'evaluation.temperature': (0.0, 'above 0'),
  'phases.train.steps': (-3, 'at least 1'),
  'phases.train.epochs': (0, 'at least 1'),
  'phases.train.minibatches': (0, 'at least 1'),
  'phases.train.micro_batches': (-1, 'at least 1'),
  'phases.train.pack': (-1, 'at least 0'),
  'phases.train.verifier_timeout': (0.0, 'above 0'),
  'phases.train.collect.prompts': (0, 'at least 1'),
  'phases.train.collect.samples_per_prompt': (0, 'at least 1'),
  'phases.train.collect.temperature': (0.0, 'above 0'),
  'phases.train.collect.top_p': (0.0, 'above 0 and at most 1'),
  'phases.train.collect.top_k': (-1, 'at least 0'),
  'phases.train.collect.lag': (-1, 'at least 0'),
  'phases.train.optimizer.learning_rate': (-1.0, 'at least 0'),
  'phases.train.optimizer.b2': (1.0, 'at least 0 and below 1'),
  'phases.train.optimizer.max_grad_norm': (0.0, 'above 0'),
}


@pytest.mark.parametrize('path', BOUNDED)
def test_a_number_that_no_run_can_have_is_refused_with_its_range(path):
  value, words = BOUNDED[path]
  config = grpo.get_config('smoke')
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=rf'config\.{re.escape(path)}: expected a number .*{words}'):
    build.build(config)


@pytest.mark.parametrize(
  'path',
  [
    'phases.train.optimizer.learning_rate',
    'phases.train.objective.surrogate.eps_high',
    'phases.train.objective.penalties.kl.weight',
    'phases.train.reward.exact.weight',
    'phases.train.collect.temperature',
  ],
)
def test_nan_is_refused_everywhere(path):
  config = grpo.get_config('smoke')
  config.update_from_flattened_dict({path: float('nan')})
  with pytest.raises(ValueError, match=rf'config\.{re.escape(path)}: expected a .*number.*nan'):
    build.build(config)


@pytest.mark.parametrize(
  ('option', 'words'),
  [
    ('steps=-3', 'steps: expected a number at least 0'),
    ('warm_start=-5', 'warm_start: expected a number at least -1'),
    ('learning_rate=nan', 'learning_rate: expected a number, got nan'),
    ('prompts=-2', 'prompts: expected a number at least 0'),
    ('rows=-8', 'task.rows: expected a number at least 1'),
    ('temperature=0', 'task.temperature: expected a number above 0'),
    ('method=dapo', 'option method is given twice'),
    ('seed=-1', 'seed: expected a number at least 0'),
    ('smoke=yes', "option smoke: expected true or false, got 'yes'"),
  ],
)
def test_options_that_no_run_can_have_are_refused(option, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    grpo.get_config(option)
