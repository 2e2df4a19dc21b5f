"""Language models as pure functions, all with the same interface, `Policy`.

| name | what it is |
|---|---|
| `decoder` | makes a policy with random weights; `config.Config` documents its settings |
| `pretrained` | makes a policy that reads its weights from a Hugging Face folder |
| `lora` | makes a policy with a low-rank adapter on top of another policy |
| `Policy` | the functions of a model: forward pass, decoding with a cache, heads, axes of parameters |
| `token_stats` | log-probabilities and other numbers for every token, without storing all logits |
| `TABLE`, `Part` | the three factories by the names that a configuration uses |

The modules:

| module | what is inside |
|---|---|
| `config` | settings of a decoder; names, axes and shapes of its parameters |
| `transformer` | the decoder |
| `attention`, `rotary`, `experts`, `kernels`, `cache` | parts of the decoder |
| `first_layers` | the first layers of a decoder as a smaller model, for proposals |
| `families`, `hf` | reading and writing Hugging Face folders |
| `gguf`, `tensors` | GGUF files; tensors that are read on demand, and safetensors files |
"""

from typing import Annotated

from polgrad.models.hf import pretrained
from polgrad.models.lora import BASE, lora
from polgrad.models.policy import Policy
from polgrad.models.token_stats import token_stats
from polgrad.models.transformer import decoder
from polgrad.registry import table

TABLE = BASE | table('models', lora)
Part = Annotated[Policy, TABLE]

__all__ = ['TABLE', 'Part', 'Policy', 'decoder', 'lora', 'pretrained', 'token_stats']
