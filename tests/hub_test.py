"""Runs of real models: their shapes as published, and whole runs of small weights of each family."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from polgrad import build, convert, evaluate, learner, loading, metrics, models, train
from polgrad.options import from_text
from polgrad.registry import part
from polgrad.types import Batch, TrainState
from tests import hub

pytestmark = pytest.mark.usefixtures('undrawn')

MODELS = pytest.mark.parametrize('model', hub.PUBLISHED)


@MODELS
def test_a_real_model_has_as_many_parameters_as_published_and_its_update_traces(model, tmp_path):
  path = hub.published(model, tmp_path)
  experiment = build.build(from_text(f'method=sft,task=chain_sum,model={model},path={path}'))
  policy, phase = experiment.policy, experiment.phases['train']
  shapes = policy.shapes()
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == hub.SIZES[model]
  rows = jax.ShapeDtypeStruct((32, 106), jnp.int32)
  batch = Batch(tokens=rows, segment_ids=rows, mask=jax.ShapeDtypeStruct((32, 106), bool))
  number = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(
    step=number,
    phase=number,
    phase_step=number,
    cursor=number,
    skipped=number,
    params=shapes,
    opt_state=jax.eval_shape(phase.optimizer.init, shapes),
    anchors={},
    update=number,
    collect_state=(),
    credit_state=(),
    objective_state=phase.objective.init(),
  )
  made = learner.Learner(policy, phase.objective, phase.optimizer)
  after, report = jax.eval_shape(made.update, state, batch)
  assert after.params == shapes
  assert report['loss'].dtype == jnp.float32


def run(method, model, tmp_path, *options, **mesh):
  path = hub.small(model, tmp_path)
  names = ['smoke', f'method={method}', 'task=chain_sum', f'model={model}', f'path={path}']
  config = from_text(','.join([*names, *options]))
  with config.unlocked():
    config.evaluation = part(build.Never)
  for phase in config.phases.values():  # small vocabularies make long prompts
    phase.collect.update(
      {k: v for k, v in dict(length=150, prompt_length=140).items() if k in phase.collect}
    )
  config.checkpoint_every = 2
  config.mesh.update(mesh)
  work = str(tmp_path / 'run')
  train.run(config, work)
  rows = metrics.read(work + '/metrics.jsonl')
  assert rows and all(np.isfinite(r['loss']) and not r['skipped'] for r in rows)
  return config, work


def export(config, work, out, **options):
  experiment = build.build(config)
  params = evaluate.restore_params(experiment, work + '/checkpoints')
  convert.export(experiment, params, out, source=convert.origin(config.model), **options)


def transformers_logits(path, tokens):
  with torch.no_grad():
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.tensor(tokens)).logits.numpy()


def our_logits(path, tokens):
  policy = models.pretrained(path=path)
  params = policy.init(jax.random.key(0))
  hidden = policy.hidden(params, jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32))
  return np.asarray(policy.unembed(params, hidden))


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9))


@pytest.mark.parametrize('model', ['qwen3', 'llama3'])
def test_training_on_a_mesh_goes_from_a_folder_to_a_folder(model, tmp_path):
  config, work = run('sft', model, tmp_path, fsdp=2, tensor=2)
  out = str(tmp_path / 'out')
  export(config, work, out)
  began = our_logits(config.model.path, TOKENS)
  ours, theirs = our_logits(out, TOKENS), transformers_logits(out, TOKENS)
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
  assert np.abs(ours - began).max() > 1e-6
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  assert tokenizer.apply_chat_template([{'role': 'user', 'content': '1+1'}], tokenize=False)
  again = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert again['model_type'] == hub.PUBLISHED[model]['model_type']


def test_reinforcement_of_a_model_with_local_layers_samples_what_it_trains(tmp_path):
  _, work = run('grpo', 'gemma3', tmp_path)
  rows = metrics.read(work + '/metrics.jsonl')
  assert all(r['sampler_max_gap'] < 0.1 for r in rows)  # bfloat16


def test_an_adapter_of_preference_learning_is_written_for_peft_or_merged(tmp_path):
  import peft

  config, work = run('dpo', 'qwen3', tmp_path, 'lora=2', 'warm_start=0')
  merged, alone = str(tmp_path / 'merged'), str(tmp_path / 'alone')
  export(config, work, merged)
  export(config, work, alone, adapter=True)
  base = transformers.AutoModelForCausalLM.from_pretrained(
    config.model.base.path, dtype=torch.float32
  )
  with torch.no_grad():
    with_adapter = peft.PeftModel.from_pretrained(base, alone)(torch.tensor(TOKENS)).logits
  expected = transformers_logits(merged, TOKENS)
  np.testing.assert_allclose(with_adapter.numpy(), expected, atol=1e-4, rtol=1e-4)
  began = transformers_logits(config.model.base.path, TOKENS)
  assert np.abs(expected - began).max() > 1e-6


def test_a_folder_names_the_stop_token_that_only_the_chat_template_writes(tmp_path):
  path = tmp_path / 'generation_config.json'
  convert.add_stops(str(tmp_path), [2, 0])
  assert json.loads(path.read_text()) == {'eos_token_id': [2, 0]}
  path.write_text('{"eos_token_id": 0, "top_k": 5}')
  convert.add_stops(str(tmp_path), [2, 0])
  assert json.loads(path.read_text()) == {'eos_token_id': [0, 2], 'top_k': 5}


def test_an_adapter_is_not_asked_of_a_run_without_one(tmp_path):
  path = hub.small('qwen3', tmp_path)
  experiment = build.build(loading.bare(path))
  with pytest.raises(ValueError, match=r'--adapter: config\.model is no lora'):
    convert.export(experiment, {}, str(tmp_path / 'x'), source=path, adapter=True)


def test_an_unknown_model_is_refused_with_the_known_ones():
  with pytest.raises(
    ValueError, match=r"unknown 'qwen9'; did you mean 'qwen3'\? valid: \['gemma3'"
  ):
    from_text('method=sft,task=chain_sum,model=qwen9')
