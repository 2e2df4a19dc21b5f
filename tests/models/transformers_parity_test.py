"""Every family against transformers on the CPU: the same folder, the same logits, either way round."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from polgrad import reward_models
from polgrad.models import Policy, hf
from polgrad.sampling import behavior_policies, make_sampler
from tests import hub

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, LENGTH = 61, 20
SHAPE = dict(
  vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  max_position_embeddings=64,
  num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2)
FAMILIES = {
  'llama': ('LlamaConfig', {}),
  'llama, tied': ('LlamaConfig', dict(tie_word_embeddings=True, head_dim=12, num_key_value_heads=4)),
  'llama, llama3 positions': (
    'LlamaConfig',
    dict(
      rope_parameters=dict(
        rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    ),
  ),
  'llama, linear positions': (
    'LlamaConfig',
    dict(rope_parameters=dict(rope_type='linear', rope_theta=10_000.0, factor=4.0)),
  ),
  'mistral': ('MistralConfig', dict(sliding_window=6, head_dim=12)),
  'mistral, no window': ('MistralConfig', dict(sliding_window=None)),
  'qwen2': ('Qwen2Config', dict(tie_word_embeddings=True)),
  'qwen2, late window': (
    'Qwen2Config',
    dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
  ),
  'qwen3': ('Qwen3Config', dict(head_dim=12)),
  'gemma2': (
    'Gemma2Config',
    dict(head_dim=12, sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
         final_logit_softcapping=3.0, num_hidden_layers=3),
  ),
  'gemma3': (
    'Gemma3TextConfig',
    dict(head_dim=12, sliding_window=6, query_pre_attn_scalar=24, num_hidden_layers=6,
         rope_parameters={
           'full_attention': dict(rope_type='linear', rope_theta=1e6, factor=8.0),
           'sliding_attention': dict(rope_type='default', rope_theta=1e4),
         }),
  ),
  'olmo2': ('Olmo2Config', {}),
  'qwen3_moe': (
    'Qwen3MoeConfig', dict(num_experts=4, moe_intermediate_size=24, head_dim=12, **EXPERTS),
  ),
  'qwen3_moe, normalized': (
    'Qwen3MoeConfig', dict(num_experts=4, moe_intermediate_size=24, norm_topk_prob=True, **EXPERTS),
  ),
  'mixtral': ('MixtralConfig', dict(num_local_experts=4, sliding_window=6, **EXPERTS)),
}  # fmt: skip


class Model(NamedTuple):
  """One model, there and here."""

  torch: transformers.PreTrainedModel
  folder: str
  policy: Policy
  params: dict


def make(family, auto=transformers.AutoModelForCausalLM, **changes):
  """A model of transformers with nothing left at 0 or 1."""
  name, settings = FAMILIES[family]
  config = getattr(transformers, name)(**SHAPE | settings | changes)
  model = auto.from_config(config, attn_implementation='eager').eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim == 1:
        p.add_(0.3 * noise)
      else:
        p.copy_(noise * (1.0 if 'embed' in name else p.shape[-1] ** -0.5))
  return model


@pytest.fixture(scope='module', params=FAMILIES)
def model(request, tmp_path_factory):
  theirs = make(request.param)
  folder = str(tmp_path_factory.mktemp('model'))
  theirs.save_pretrained(folder)
  policy = hf.pretrained(path=folder)
  logits = jax.jit(lambda *args: policy.unembed(args[0], policy.hidden(*args)))
  return Model(theirs, folder, policy, policy.init(jax.random.key(0))), logits


def load(folder, dtype='float32', auto=transformers.AutoModelForCausalLM):
  return auto.from_pretrained(folder, attn_implementation='eager', dtype=dtype).eval()


def documents(*lengths):
  random = np.random.default_rng(sum(lengths))
  return [random.integers(3, VOCAB, n) for n in lengths]


@torch.no_grad()
def torch_logits(model, tokens):
  """Logits of one row with nothing around it."""
  return model(torch.tensor(np.asarray(tokens)[None])).logits[0].float().numpy()


def assert_close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def layout(*rows):
  """Documents at columns: tokens and segment ids of [rows, LENGTH]."""
  tokens = np.zeros((len(rows), LENGTH), np.int32)
  segments = np.zeros_like(tokens)
  for i, row in enumerate(rows):
    for number, (start, document) in enumerate(row, 1):
      tokens[i, start : start + len(document)] = document
      segments[i, start : start + len(document)] = number
  return tokens, segments


LAYOUTS = {
  'whole rows': lambda a, b: ([(0, a(20))], [(0, b(20))]),
  'padding on the left and on the right': lambda a, b: ([(7, a(13))], [(0, b(17))]),
  'padding on both sides': lambda a, b: ([(2, a(9))], [(8, b(3))]),
  'packed rows': lambda a, b: ([(0, a(8)), (8, b(12))], [(1, b(5)), (6, a(10))]),
}


def test_logits_agree_over_padding_and_packing(model):
  model, logits = model
  a, b = documents(20, 21)
  for name, rows in LAYOUTS.items():
    rows = rows(lambda n: a[:n], lambda n: b[:n])
    found = np.asarray(logits(model.params, *layout(*rows)))
    for i, row in enumerate(rows):
      for start, document in row:
        wanted = torch_logits(model.torch, document)
        np.testing.assert_allclose(
          found[i, start : start + len(document)], wanted, rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_logits_agree_when_decoding_with_the_cache(model):
  model, _ = model
  policy, prompt = model.policy, 9
  rows = documents(LENGTH, LENGTH - 4)
  tokens, segments = layout(*([(LENGTH - len(row), row)] for row in rows))
  valid = segments > 0
  positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
  params = policy.unstack(model.params)

  @jax.jit
  def run(params, tokens, positions, valid, cache, index):
    hidden, cache = policy.decode(params, tokens, positions, valid, cache, index)
    return policy.unembed(params, hidden), cache

  cache, found = policy.init_cache(2, LENGTH), []
  for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, LENGTH))]:
    at = np.s_[:, start:stop]
    logits, cache = run(params, tokens[at], positions[at], valid[at], cache, start)
    found.append(np.asarray(logits))
  found = np.concatenate(found, axis=1)
  for i, row in enumerate(rows):
    assert_close(found[i, -len(row) :], torch_logits(model.torch, row))


def test_saved_folders_are_the_same_model_in_transformers(model, tmp_path):
  model, _ = model
  hf.save(tmp_path / 'alone', model.policy.config, model.params)
  hf.save(tmp_path / 'sourced', model.policy.config, model.params, source=model.folder)
  first = load_file(f'{model.folder}/model.safetensors')
  (row,) = documents(LENGTH)
  wanted = torch_logits(model.torch, row)
  for folder in (tmp_path / 'alone', tmp_path / 'sourced'):
    tensors = load_file(folder / 'model.safetensors')
    assert tensors.keys() == first.keys()
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(tensor, first[name], err_msg=name)
    assert hf.pretrained(path=str(folder)).config == model.policy.config
    again = load(folder)
    np.testing.assert_allclose(torch_logits(again, row), wanted, rtol=1e-6, atol=1e-6)
  assert type(again) is type(model.torch)
  configs = (again.config.to_dict(), load(model.folder).config.to_dict())
  assert configs[0] | {'_name_or_path': ''} == configs[1] | {'_name_or_path': ''}


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'qwen3_moe'])
def test_bfloat16_folders_survive_bit_by_bit(family, tmp_path):
  make(family).to(torch.bfloat16).save_pretrained(tmp_path / 'first')
  theirs = load(tmp_path / 'first')
  (row,) = documents(LENGTH)
  policy = hf.pretrained(path=str(tmp_path / 'first'))
  params = policy.init(jax.random.key(0))
  hidden = policy.hidden(
    params, jnp.asarray(row[None], jnp.int32), jnp.ones((1, LENGTH), jnp.int32)
  )
  assert_close(policy.unembed(params, hidden)[0], torch_logits(theirs, row))

  low = hf.pretrained(path=str(tmp_path / 'first'), param_dtype='bfloat16')
  hf.save(tmp_path / 'second', low.config, low.init(jax.random.key(0)))
  a, b = (load_file(tmp_path / name / 'model.safetensors') for name in ('first', 'second'))
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name].view(np.uint16), b[name].view(np.uint16))
  assert load(tmp_path / 'second', dtype='auto').dtype == torch.bfloat16


def test_transformers_joins_our_shards_and_we_join_its(tmp_path):
  theirs = make('mixtral')
  theirs.save_pretrained(tmp_path / 'first', max_shard_size='20KB')
  assert len(list((tmp_path / 'first').glob('model-*.safetensors'))) > 2
  policy = hf.pretrained(path=str(tmp_path / 'first'))
  params = policy.init(jax.random.key(0))
  hf.save(tmp_path / 'second', policy.config, params, max_shard_bytes=20_000)
  files = list((tmp_path / 'second').glob('model-*.safetensors'))
  assert len(files) > 2 and all(file.stat().st_size < 24_000 for file in files)
  again = load(tmp_path / 'second')
  (row,) = documents(LENGTH)
  np.testing.assert_allclose(
    torch_logits(again, row), torch_logits(theirs, row), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'gemma3', 'mixtral'])
def test_reward_models_agree_either_way_round(family, tmp_path):
  auto = transformers.AutoModelForSequenceClassification
  theirs = make(family, auto, num_labels=1)
  theirs.save_pretrained(tmp_path / 'first')
  policy = hf.pretrained(path=str(tmp_path / 'first'), value_head=True)
  params = policy.init(jax.random.key(0))
  a, b = documents(20, 14)
  tokens, segments = layout([(0, a)], [(0, b)])
  values = policy.value(params, policy.hidden(params, tokens, segments))
  hf.save(tmp_path / 'second', policy.config, params, source=tmp_path / 'first', reward_model=True)
  again = load(tmp_path / 'second', auto=auto)
  assert type(again) is type(theirs)
  with torch.no_grad():
    for model in (theirs, again):
      mask = torch.tensor(segments)
      wanted = model(torch.tensor(tokens, dtype=torch.long), attention_mask=mask).logits
      assert_close([values[0, 19], values[1, 13]], wanted[:, 0].numpy())
  with pytest.raises(ValueError, match='reward model; it needs value_head=True'):
    hf.pretrained(path=str(tmp_path / 'first'))


def test_the_verifier_scores_as_transformers_does_also_where_the_stop_token_was_the_pad_token(
  tmp_path,
):
  folder = hub.reward_model(tmp_path, seed=0)
  records = [dict(prompt=f'Say {i}', id=i) for i in range(3)]
  texts = ['Hello world', '42!', 'I am well. The answer is 42!']
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert model.config.num_labels == 1
  assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
  chat = lambda record, text: tokenizer.apply_chat_template(
    [{'role': 'user', 'content': record['prompt']}, {'role': 'assistant', 'content': text}],
    tokenize=False,
  ).rstrip('\n')  # this template writes a line after the stop token
  rows = tokenizer([*map(chat, records, texts)], return_tensors='pt', padding=True)
  with torch.no_grad():
    wanted = model(rows['input_ids'], attention_mask=rows['attention_mask']).logits[:, 0]
  found = reward_models.reward_model(path=folder)(texts, records)
  np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
  assert np.ptp(found) > 0.1


PROMPTS = (
  'What is 17 plus 25? Explain step by step.',
  'hello',
  'Which planet is the largest of the solar system, and how many moons does it have?',
)
TEXT = (
  'The lighthouse at the end of the pier was built in 1874, when the harbour handled forty ships a '
  'week. Its keeper, Anna Björk, wrote: "No fog today; the lamp burned clear until 6:30."\n\n'
  'def area(radius):\n    return 3.14159 * radius ** 2\n\nThe tower was restored for €1.2 million.'
)


def test_smollm2_says_what_it_says_in_transformers(smollm2):
  tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2, padding_side='left')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype='float32').eval()
  policy = hf.pretrained(path=smollm2, max_length=256)
  params = policy.init(jax.random.key(0))

  row = tokenizer(TEXT)['input_ids']
  hidden = policy.hidden(params, jnp.array([row]), jnp.ones((1, len(row)), jnp.int32))
  wanted = torch_logits(theirs, row)
  np.testing.assert_allclose(policy.unembed(params, hidden)[0], wanted, rtol=1e-4, atol=2e-3)

  chats = [[{'role': 'user', 'content': prompt}] for prompt in PROMPTS]
  prompts = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors='pt'
  )
  with torch.no_grad():
    out = theirs.generate(**prompts, do_sample=False, max_new_tokens=10).numpy()
  tokens, mask = prompts['input_ids'].numpy(), prompts['attention_mask'].numpy() > 0
  stop = tokenizer.eos_token_id
  sample = make_sampler(
    {'policy': policy},
    behavior_policy=behavior_policies.greedy,
    max_new_tokens=10,
    stop_ids=(stop,),
    pad_id=stop,
  )
  found = sample({'policy': params}, tokens, mask, np.arange(len(tokens)), seed=0, step=0)
  width = tokens.shape[1]
  made = np.asarray(found.tokens)[:, width:]
  assert found.mask[:, width:].sum() > len(PROMPTS) * 8  # they do talk
  for prompt, ours, wanted in zip(PROMPTS, made, out[:, width:], strict=True):
    assert tokenizer.decode(ours) == tokenizer.decode(wanted), prompt
    np.testing.assert_array_equal(ours[: len(wanted)], wanted, err_msg=prompt)


MEMORY = """
import json, re, sys
import jax, jax.numpy as jnp
from polgrad.models import hf
from polgrad.sharding import make_mesh, param_shardings

def resident(key):
  return 1024 * int(re.search(key + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1])

jnp.ones((64, 64)).sum().block_until_ready()
policy = hf.pretrained(path=sys.argv[1])
shapes = policy.shapes()
shardings = param_shardings(make_mesh(), policy.axes(shapes), shapes)
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
before = resident('VmRSS')
params = policy.init(jax.random.key(0), shardings)
jax.block_until_ready(params)
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({'peak': resident('VmHWM') - before, 'size': size}))
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='reads /proc')
def test_loading_smollm2_takes_little_more_memory_than_the_model(smollm2):
  command = [sys.executable, '-c', MEMORY, smollm2]
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  found = json.loads(out.splitlines()[-1])
  assert found['size'] > 530e6
  assert found['peak'] < 1.3 * found['size'], found['peak'] / found['size']
