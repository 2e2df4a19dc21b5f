"""Writes a model as a Hugging Face folder, which transformers and vLLM read.

    python -m polgrad.convert --config=experiments/supervised/hub_sft.py:path=FOLDER \\
      --workdir=runs/hub_sft --out=OUT
    python -m polgrad.convert ... --adapter            # only the LoRA adapter, for PEFT
    python -m polgrad.convert ... --params=average     # an anchor, such as the average of the policy
    python -m polgrad.convert ... --step=best          # the checkpoint of config.keep_best
    python -m polgrad.convert ... --reward_model       # a classifier, see docs/reward_models.md
    python -m polgrad.convert --gguf=FILE --out=OUT    # a GGUF file instead of a checkpoint
    python -m polgrad.convert --model=FOLDER --out=OUT --config.model.param_dtype=bfloat16

The model is chosen as `polgrad.loading` says: a checkpoint, the model of a configuration before
training, or a Hugging Face folder, which is then written anew, for example in another dtype. A LoRA
adapter is merged into its base, unless --adapter is given. The tokenizer and the settings of the model
come from the Hugging Face folder that the run began with; generation_config.json also gets the stop
tokens that it lacks, such as one that only the chat template writes. OUT must be empty or not exist.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from polgrad import cli, jsons, loading
from polgrad.build import Experiment, head, origin
from polgrad.data.tokenizers import Tokenizer
from polgrad.models import gguf, heads, hf
from polgrad.models.lora import merge, save_adapter
from polgrad.registry import part
from polgrad.sharding import to_host
from polgrad.types import Params

_GGUF = flags.DEFINE_string('gguf', '', 'A GGUF file to convert instead of a checkpoint.')
_ADAPTER = flags.DEFINE_bool(
  'adapter', False, 'Write only the LoRA adapter, in the layout of PEFT.'
)
_REWARD = flags.DEFINE_bool(
  'reward_model',
  False,
  'Write a classifier whose one label is the value head, not a language model.',
)


def export(
  experiment: Experiment,
  params: Params,
  out: str,
  *,
  source: str,
  adapter: bool = False,
  reward_model: bool = False,
) -> None:
  """Writes the policy of an experiment as a Hugging Face folder.

  Args:
    params: its parameters.
    out: folder to write; it must be empty or not exist.
    source: the folder that the model began with, see `origin`.
    adapter: write only the LoRA adapter.
    reward_model: write a classifier whose one label is the value head, not a language model. If the
      run's objective has a head whose layers give the score, write the language model and these layers.

  Raises:
    ValueError: `adapter`, but the model has no LoRA adapter.
  """
  policy = experiment.policy
  if adapter and not policy.config.lora_rank:
    raise ValueError('--adapter: config.model is no lora, so there is no adapter')
  with jax.set_mesh(experiment.mesh):
    if adapter:
      return save_adapter(out, policy.config, params, base_model=source)
    of_model, layers = heads.without_head(params), None
    one = head(experiment)
    if reward_model and one is not None and one.scores:
      layers = to_host(params['head']), part(type(one), **dataclasses.asdict(one)).to_dict()
    lora = policy.config.lora_rank
    whole = merge(policy.config, of_model) if lora else (policy.config, of_model)
    hf.save(out, *whole, source=source, reward_model=reward_model and not layers, layers=layers)
  if source and jax.process_index() == 0:
    if reward_model:
      set_padding(out, experiment.tokenizer)
    else:
      add_stops(out, experiment.tokenizer.stop_ids)


def add_stops(folder: str, stop_ids: Sequence[int]) -> None:
  """Names all stop tokens in generation_config.json, if it or config.json lacks one of them."""
  path = pathlib.Path(folder) / 'generation_config.json'
  read = lambda file: jsons.read_object(file) if file.exists() else {}
  stated = read(path)
  named = (stated or read(path.with_name('config.json'))).get('eos_token_id')
  named = [named] if isinstance(named, int) else named or []
  missing = [i for i in stop_ids if i not in named]
  if missing:
    text = json.dumps(stated | {'eos_token_id': [*named, *missing]}, indent=2)
    path.write_text(text, encoding='utf-8')


def set_padding(folder: str, tokenizer: Tokenizer) -> None:
  """Names a pad token that ends no completion, in config.json and in the settings of the tokenizer.

  The transformers library reads the score of a row at the last token that is not the pad token, which
  must be the stop token. So where that is the pad token, another special token takes its place: any that
  is not the last one of a row will do.
  """
  end, *others = tokenizer.stop_ids
  usual = (tokenizer.pad_id, *others, tokenizer.bos_id, tokenizer.context_id, 0, 1)
  pad = next(i for i in usual if i not in (-1, end))
  path = pathlib.Path(folder)
  names = {path / 'config.json': {'pad_token_id': pad}}
  if pad != tokenizer.pad_id:
    names[path / 'tokenizer_config.json'] = {'pad_token': tokenizer.name(pad)}
    names[path / 'special_tokens_map.json'] = {'pad_token': tokenizer.name(pad)}
  for file, value in names.items():
    if file.exists():
      text = json.dumps(jsons.read_object(file) | value, indent=2, ensure_ascii=False)
      file.write_text(text, encoding='utf-8')


def main(argv: list[str]) -> None:
  if not _GGUF.value:
    loading.start(argv)
  with cli.refusals():
    if not cli.OUT.value:
      raise ValueError('name the folder to write: --out=FOLDER')
    if _GGUF.value:
      if loading.MODEL.value or cli.CONFIG.value is not None:
        raise ValueError('--gguf is the model to write, so it cannot have --model or --config')
      gguf.convert(_GGUF.value, cli.OUT.value)
    else:
      config = loading.config(reward_models=True)
      bare = bool(loading.MODEL.value) and hf.is_reward_model(loading.MODEL.value)
      export(
        *loading.load(config),
        cli.OUT.value,
        source=origin(config['model']),
        adapter=_ADAPTER.value,
        reward_model=_REWARD.value or bare,
      )
  print(f'wrote {cli.OUT.value}')


if __name__ == '__main__':
  cli.run(main)
