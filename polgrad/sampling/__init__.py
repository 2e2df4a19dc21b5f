"""Sampling: completions of prompts, drawn from a chosen distribution by one compiled program.

| name | what it is |
|---|---|
| `make_sampler` | makes the function that draws completions: prompts -> `Rollout` |
| `behavior_policies` | who draws: the policy, greedily, a reference, mixtures, with a scorer |
| `engines` | who runs this: polgrad, or a process of vLLM that gets the weights |
| `make_turn_sampler` | the same for rows of several turns: between them the policy reads replies |
| `make_resumable_sampler` | the same in pieces: rows that are not over continue with other weights |
| `blockwise` | continues with the best of several blocks, as a scorer or a verifier says |
| `speculation` | what proposes tokens, of which the models check several in one pass |
| `stopping` | texts that end a completion, as a table of states and tokens |
| `streaming` | one completion token by token, for a chat |
| `processors` | what is done to its logits before a draw: temperature, top-k, top-p |
"""

from polgrad.sampling import behavior_policies, engines, processors, speculation
from polgrad.sampling.blockwise import make_block_sampler, prefix_value
from polgrad.sampling.resumable import make_resumable_sampler
from polgrad.sampling.sampler import make_sampler
from polgrad.sampling.turns import make_turn_sampler

__all__ = [
  'behavior_policies',
  'engines',
  'make_block_sampler',
  'make_resumable_sampler',
  'make_sampler',
  'make_turn_sampler',
  'prefix_value',
  'processors',
  'speculation',
]
