"""Prints completions of a checkpoint, in the shell.

    python -m polgrad.sample --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m polgrad.sample ... --prompt='12+34='

Without --prompt, every line of the standard input is a prompt. With --chat, every line is a user's
turn: the prompt is the conversation so far in the tokenizer's chat template.
"""

import sys
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from absl import flags

from polgrad import cli, loading, sharding
from polgrad.build import Experiment
from polgrad.collect import completions
from polgrad.data import batching
from polgrad.sampling import behavior_policies
from polgrad.sampling.sampler import make_sampler
from polgrad.sampling.stopping import stop_table
from polgrad.types import Params

_PROMPT = flags.DEFINE_multi_string(
  'prompt', [], 'Prompts to complete; repeat the flag for more. Default: read lines.'
)
_CHAT = flags.DEFINE_bool('chat', False, 'Read lines as turns of a conversation.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'Sampling temperature; 0 is greedy.')
_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Maximum length of a completion.')
_PREFIX = flags.DEFINE_string('prefix', '', 'Given beginning of every completion, such as <think>.')
_STOP = flags.DEFINE_multi_string(
  'stop', [], 'Text that ends a completion; repeat the flag for more.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sampling noise.')

BUCKET = 64  # prompts are padded to a multiple of this number of tokens, so that few shapes compile


def make_completer(
  experiment: Experiment,
  params: Params,
  *,
  temperature: float,
  max_new_tokens: int,
  seed: int,
  prefix: str = '',
  stop_strings: Sequence[str] = (),
) -> Callable[[dict, int], str]:
  """Makes `complete(record, turn) -> text`, for records with a `prompt` or `messages`.

  Args:
    temperature: 0 is greedy.
    max_new_tokens: maximum length of a completion, at most half of the model's context.
    seed: with `turn`, a number, it seeds the sampling noise.
    prefix: given beginning of every completion.
    stop_strings: texts that end a completion, besides the stop tokens.
  """
  tokenizer = experiment.tokenizer.sampling(prefix, stop_strings)
  max_new_tokens = min(max_new_tokens, experiment.policy.config.max_length // 2)
  sample = make_sampler(
    {'policy': experiment.policy},
    samples_per_prompt=1,
    max_new_tokens=max_new_tokens,
    temperature=temperature or 1.0,
    behavior_policy=behavior_policies.current if temperature else behavior_policies.greedy,
    mesh=experiment.mesh,
    stop_ids=tokenizer.stop_ids,
    stop_table=stop_table(tokenizer, experiment.policy.config.vocab_size),
    pad_id=tokenizer.pad_id,
  )

  def complete(record: dict, turn: int) -> str:
    # One prompt, padded on the left to a multiple of BUCKET.
    longest = experiment.policy.config.max_length - max_new_tokens
    prompts = batching.prompts([{**record, 'id': turn}], tokenizer, length=longest)
    used = int(prompts.mask.sum())
    width = min(-(-used // BUCKET) * BUCKET, longest)

    # The rows are sharded over the mesh, so there must be at least as many as shards: copies fill up.
    copies = sharding.data_parallel_size(experiment.mesh)
    tokens, mask, ids = (
      np.repeat(x[:, -width:] if x.ndim == 2 else x, copies, axis=0)
      for x in (prompts.tokens, prompts.mask, prompts.ids)
    )
    rollout = sample({'policy': params}, tokens, mask, ids, seed=seed, step=turn)
    return completions(sharding.to_host(rollout), [record] * copies, tokenizer)[0]

  return complete


def converse(complete: Callable[[dict, int], str], lines: Iterable[str], *, chat: bool) -> None:
  """Prints the completion of each line; in a chat it answers all lines and replies so far."""
  messages = []
  for turn, line in enumerate(lines):
    line = line.rstrip('\n')
    if chat:
      messages.append({'role': 'user', 'content': line})
      reply = complete({'messages': messages}, turn)
      messages.append({'role': 'assistant', 'content': reply})
    else:
      reply = complete({'prompt': line}, turn)
    print(reply, flush=True)


def main(argv: list[str]) -> None:
  loading.start(argv)
  with cli.refusals():
    experiment, params = loading.load(loading.config())
  with jax.set_mesh(experiment.mesh):
    complete = make_completer(
      experiment,
      params,
      temperature=_TEMPERATURE.value,
      max_new_tokens=_TOKENS.value,
      seed=_SEED.value,
      prefix=_PREFIX.value,
      stop_strings=_STOP.value,
    )
    converse(complete, _PROMPT.value or sys.stdin, chat=_CHAT.value)


if __name__ == '__main__':
  cli.run(main)
