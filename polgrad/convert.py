"""Writes the policy of a checkpoint as a Hugging Face folder, which transformers and vLLM read.

    python -m polgrad.convert --config=experiments/supervised/hub_sft.py:path=FOLDER \\
      --workdir=runs/hub_sft --out=OUT
    python -m polgrad.convert ... --adapter            # only the LoRA adapter, for PEFT
    python -m polgrad.convert --gguf=FILE --out=OUT    # a GGUF file instead of a checkpoint

A LoRA adapter is merged into its base, unless --adapter is given. The tokenizer and the settings of the
model come from the Hugging Face folder that the run began with. OUT must be empty or not exist.
"""

from collections.abc import Mapping

import jax
from absl import flags

from polgrad import cli
from polgrad.build import build
from polgrad.evaluate import restore_params
from polgrad.models import gguf, hf
from polgrad.models.lora import merge, save_adapter

_OUT = flags.DEFINE_string(
  'out', None, 'Folder to write; it must be empty or not exist.', required=True
)
_GGUF = flags.DEFINE_string('gguf', '', 'A GGUF file to convert instead of a checkpoint.')
_ADAPTER = flags.DEFINE_bool(
  'adapter', False, 'Write only the LoRA adapter, in the layout of PEFT.'
)
_REWARD = flags.DEFINE_bool(
  'reward_model',
  False,
  'Write a classifier whose one label is the value head, not a language model.',
)


def origin(model: Mapping) -> str:
  """The Hugging Face folder whose weights a model configuration starts from; '' if it names none."""
  return origin(model['base']) if 'base' in model else model.get('path', '')


def export(config: Mapping, folder: str, out: str, *, step: int, adapter: bool, reward_model: bool):
  """Writes the policy of a checkpoint as a Hugging Face folder.

  Args:
    config: the experiment's configuration.
    folder: folder of the run's checkpoints.
    out: folder to write; it must be empty or not exist.
    step: number of the checkpoint; -1 is the newest.
    adapter: write only the LoRA adapter.
    reward_model: write a classifier whose one label is the value head, not a language model.

  Raises:
    ValueError: `adapter`, but the model has no LoRA adapter.
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
  if not _GGUF.value:
    cli.start(argv)
  with cli.refusals():
    if _GGUF.value:
      gguf.convert(_GGUF.value, _OUT.value)
    else:
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
  cli.run(main)
