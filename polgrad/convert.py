"""Takes the policy of a checkpoint to the Hugging Face layout, which transformers and vLLM read.

    python -m polgrad.convert --config=experiments/supervised/hub_sft.py:path=FOLDER \\
      --workdir=runs/hub_sft --out=OUT
    python -m polgrad.convert ... --adapter       # a LoRA adapter by itself, for PEFT
    python -m polgrad.convert --gguf=FILE --out=OUT

A LoRA adapter is merged into its base unless --adapter asks for it alone. The tokenizer's files, and
what else stands beside the weights, come from the folder that the run began with. OUT must not exist."""

from collections.abc import Mapping

import jax
from absl import app, flags

from polgrad import cli
from polgrad.build import build
from polgrad.evaluate import restore_params
from polgrad.models import gguf, hf
from polgrad.models.lora import merge, save_adapter

_OUT = flags.DEFINE_string('out', None, 'Folder to make.', required=True)
_GGUF = flags.DEFINE_string('gguf', '', 'A GGUF file to convert instead of a checkpoint.')
_ADAPTER = flags.DEFINE_bool(
  'adapter', False, 'Write the LoRA adapter alone, in the layout of PEFT.'
)
_REWARD = flags.DEFINE_bool(
  'reward_model', False, 'Write the scalar head: sequence classification.'
)


def origin(model: Mapping) -> str:
  """The Hugging Face folder that a model's configuration begins with, '' if there is none."""
  return origin(model['base']) if 'base' in model else model.get('path', '')


def export(config: Mapping, folder: str, out: str, *, step: int, adapter: bool, reward_model: bool):
  """Writes the policy of a checkpoint in `folder` to `out`.

  Raises:
    ValueError: an adapter is asked for and there is none.
  """
  experiment = build(config)
  policy, source = experiment.policy, origin(config['model'])
  if adapter and not policy.config.lora_rank:
    raise ValueError('--adapter: config.model is no lora, so there is no adapter')
  with jax.set_mesh(experiment.mesh):
    params = restore_params(experiment, folder, step)
    if adapter:
      return save_adapter(out, policy.config, params, base_model=source)
    if policy.config.lora_rank:
      return hf.save(out, *merge(policy.config, params), source=source, reward_model=reward_model)
    return hf.save(out, policy.config, params, source=source, reward_model=reward_model)


def main(argv: list[str]) -> None:
  if _GGUF.value:
    gguf.convert(_GGUF.value, _OUT.value)
  else:
    cli.start(argv)
    export(
      cli.CONFIG.value,
      cli.checkpoint_folder(),
      _OUT.value,
      step=cli.STEP.value,
      adapter=_ADAPTER.value,
      reward_model=_REWARD.value,
    )
  print(f'wrote {_OUT.value}')


if __name__ == '__main__':
  app.run(main)
