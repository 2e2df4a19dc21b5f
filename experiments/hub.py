"""Real models: what a run needs to know of each, whatever the method. Folders come from the hub.

    :model=qwen3,path=~/Qwen3-0.6B      a name of `MODELS` and a Hugging Face folder of it
    POLGRAD_QWEN3=~/Qwen3-0.6B          instead of path=

`smollm2` is SmolLM2-135M-Instruct and runs on a CPU; `launch/fetch_smollm2.py` makes its folder. The
others are meant for a TPU host (four chips or more, bfloat16 compute on float32 parameters).
"""

import os

from ml_collections import ConfigDict

from experiments.common import options
from polgrad import models, sharding
from polgrad.build import experiment, held_out
from polgrad.data import sources, tokenizers
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers

# Tokens that the prompts of `sums` may have depend on the chat template; Llama's tells the date.
TPU = dict(model=dict(dtype='bfloat16', remat='full'), fsdp=4, prompt_length=96)
MODELS = {
  'smollm2': dict(model=dict(dtype='float32'), fsdp=1, prompt_length=48),
  'qwen3': TPU,  # Qwen3-0.6B
  'llama3': TPU,  # Llama-3.2-1B-Instruct
  'gemma3': TPU,  # gemma-3-1b-it
}
SYSTEM = 'You are a calculator. Reply with the number only.'


def hub_options(text: str, **defaults) -> ConfigDict:
  """Options that all runs of real models have, and some of their own.

  `lora=8` trains an adapter of that rank instead of all parameters.

  Raises:
    ValueError: an unknown model or option.
  """
  o = options(text, model='smollm2', path='', lora=0, smoke=False, **defaults)
  if o.model not in MODELS:
    raise ValueError(f'option model: unknown {o.model!r}; valid: {sorted(MODELS)}')
  o.path = os.path.expanduser(o.path or os.environ.get(f'POLGRAD_{o.model.upper()}', ''))
  if not o.path:
    raise ValueError(f'option path, or POLGRAD_{o.model.upper()}: needs a folder of {o.model}')
  o.prompt_length = MODELS[o.model]['prompt_length']
  return o


def sums(*, size: int, seed: int) -> ConfigDict:
  """Sums and differences of two numbers of one or two digits (reasoning-gym), as a user's turn."""
  task = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2)
  problems = part(sources.reasoning_gym, task='chain_sum', size=size, seed=seed, options=task)
  return part(sources.as_chat, source=problems, system=SYSTEM)


def solved() -> dict[str, ConfigDict]:
  """reasoning-gym's verdict on the last number of the reply."""
  return {'score': weighted(1.0, part(verifiers.reasoning_gym_score, pattern=r'-?\d+'))}


def hub_experiment(o: ConfigDict, phases: dict[str, ConfigDict]) -> ConfigDict:
  """A run on a real model, measured on 64 held-out sums."""
  settings = MODELS[o.model]
  model = part(models.pretrained, path=o.path, max_length=256, **settings['model'])
  if o.lora:
    model = part(models.lora, base=model, rank=o.lora, alpha=2.0 * o.lora)
  mesh = dict(data=1) if o.smoke else dict(data=-1, fsdp=settings['fsdp'])
  return part(
    experiment,
    tokenizer=part(tokenizers.huggingface, path=o.path),
    model=model,
    mesh=part(sharding.make_mesh, **mesh),
    phases=phases,
    order=tuple(phases),
    evaluation=part(
      held_out,
      every=10,
      source=sums(size=64, seed=1_000_000),
      reward=solved(),
      problems=4 if o.smoke else 64,
      batch=4 if o.smoke else 32,
      prompt_length=o.prompt_length,
      max_new_tokens=4 if o.smoke else 10,
    ),
  )
