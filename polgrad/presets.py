"""Models by name: tokenizer, policy, mesh, precision, and learning rates that suit them.

| preset | what it is |
|---|---|
| `tiny` | 0.4 million parameters trained from scratch, with characters as tokens; runs anywhere |
| `smollm2` | SmolLM2-135M-Instruct; runs on a CPU, `launch/fetch_smollm2.py` makes its folder |
| `qwen3` | Qwen3-0.6B, for a TPU host of four chips or more |
| `llama3` | Llama-3.2-1B-Instruct, for the same |
| `gemma3` | gemma-3-1b-it, for the same |
| `hf` | any folder of a supported family, see `polgrad.models.families` |

Each is a function that returns a `Preset`. `path` is a Hugging Face folder, or the variable
POLGRAD_SMOLLM2 (POLGRAD_QWEN3, ...) names it. `lora=8` trains an adapter of that rank instead of all
parameters.
"""

import dataclasses
import os
from collections.abc import Mapping

from ml_collections import ConfigDict

from polgrad import jsons, models, paths, sharding
from polgrad.data import tokenizers
from polgrad.registry import part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """A model and its surroundings as parts.

  Attributes:
    tokenizer: a part of `polgrad.data.tokenizers`.
    model: a part of `polgrad.models`.
    mesh: a part of `polgrad.sharding`.
    learning_rates: of AdamW, by what is learned: 'reinforce', 'preference' and 'imitate'.
    warm_start: supervised steps on the demonstrations of the task before other methods begin; a
      model that was not pretrained needs them to find any reward.
    chat: whether prompts are put into the tokenizer's chat template.
    template_tokens: tokens that the chat template and a short system turn add to a prompt.
  """

  tokenizer: ConfigDict
  model: ConfigDict
  mesh: ConfigDict
  learning_rates: Mapping[str, float]
  warm_start: int = 0
  chat: bool = False
  template_tokens: int = 0


def tiny(*, alphabet: str, lora: int = 0) -> Preset:
  """Three layers of width 96; learns two-digit addition in minutes on a CPU.

  Args:
    alphabet: characters of prompts and answers; the task gives them.
    lora: rank of an adapter; the base is random and frozen, so this is only for trying adapters out.
  """
  decoder = part(
    models.decoder,
    vocab_size=len(alphabet) + 2,
    num_layers=3,
    width=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    mlp_width=288,
    max_length=64,
  )
  model, rates = _adapted(decoder, lora, {'reinforce': 1e-4, 'preference': 1e-4, 'imitate': 1e-3})
  return Preset(
    tokenizer=part(tokenizers.characters, alphabet=alphabet),
    model=model,
    mesh=part(sharding.make_mesh, data=-1),
    learning_rates=rates,
    warm_start=180,
  )


def smollm2(*, path: str = '', lora: int = 0) -> Preset:
  """SmolLM2-135M-Instruct in float32. Learning rates are those of the measured runs."""
  folder = _folder('smollm2', path)
  return _pretrained(folder, lora, dtype='float32', fsdp=1, template_tokens=20)


def qwen3(*, path: str = '', lora: int = 0, fsdp: int = 4) -> Preset:
  """Qwen3-0.6B, bfloat16 compute on float32 parameters."""
  return _on_tpu(_folder('qwen3', path), lora, fsdp)


def llama3(*, path: str = '', lora: int = 0, fsdp: int = 4) -> Preset:
  """Llama-3.2-1B-Instruct, bfloat16 compute on float32 parameters.

  Its template tells a date, `config.tokenizer.date`.
  """
  return _on_tpu(_folder('llama3', path), lora, fsdp)


def gemma3(*, path: str = '', lora: int = 0, fsdp: int = 4) -> Preset:
  """gemma-3-1b-it, bfloat16 compute on float32 parameters."""
  return _on_tpu(_folder('gemma3', path), lora, fsdp)


def hf(*, path: str = '', lora: int = 0, fsdp: int = 1, dtype: str = 'float32') -> Preset:
  """A Hugging Face folder of a supported family. Chats if the folder has a chat template.

  Args:
    path: the folder.
    lora: rank of an adapter that is trained; 0 trains all parameters.
    fsdp: number of devices that the parameters are cut over.
    dtype: of the computation, 'float32' or 'bfloat16'.
  """
  folder = _folder('hf', path)
  chat = _has_template(folder)
  return _pretrained(
    folder, lora, dtype=dtype, fsdp=fsdp, template_tokens=64 if chat else 0, chat=chat
  )


def _on_tpu(folder: str, lora: int, fsdp: int) -> Preset:
  return _pretrained(folder, lora, dtype='bfloat16', fsdp=fsdp, template_tokens=64, remat='full')


def _pretrained(
  folder: str,
  lora: int,
  *,
  dtype: str,
  fsdp: int,
  template_tokens: int,
  chat: bool = True,
  remat: str = 'none',
) -> Preset:
  model = part(models.pretrained, path=folder, max_length=256, dtype=dtype, remat=remat)
  model, rates = _adapted(model, lora, {'reinforce': 1e-5, 'preference': 5e-6, 'imitate': 2e-5})
  return Preset(
    tokenizer=part(tokenizers.huggingface, path=folder),
    model=model,
    mesh=part(sharding.make_mesh, data=-1, fsdp=fsdp),
    learning_rates=rates,
    chat=chat,
    template_tokens=template_tokens,
  )


def _adapted(
  model: ConfigDict, rank: int, rates: dict[str, float]
) -> tuple[ConfigDict, dict[str, float]]:
  """The model with an adapter of this rank, learning at ten times the rates; rank 0 changes nothing."""
  if not rank:
    return model, rates
  adapted = part(models.lora, base=model, rank=rank, alpha=2.0 * rank)
  return adapted, {name: 10 * rate for name, rate in rates.items()}


def _folder(preset: str, path: str) -> str:
  """The folder of the model.

  Raises:
    ValueError: no folder is named.
    FileNotFoundError: the folder does not exist.
  """
  variable = f'POLGRAD_{preset.upper()}'
  folder = path or os.environ.get(variable, '')
  if not folder:
    raise ValueError(f'model={preset} needs path=FOLDER (or the variable {variable})')
  if not paths.path(folder).is_dir():
    hint = '; launch/fetch_smollm2.py makes one' if preset == 'smollm2' else ''
    raise FileNotFoundError(f'model={preset}: there is no folder {folder}{hint}')
  return str(paths.path(folder))


def _has_template(folder: str) -> bool:
  file = paths.path(folder) / 'tokenizer_config.json'
  if file.with_name('chat_template.jinja').is_file():
    return True
  return file.is_file() and bool(jsons.read_object(file).get('chat_template'))


TABLE = {fn.__name__: fn for fn in (tiny, smollm2, qwen3, llama3, gemma3, hf)}
