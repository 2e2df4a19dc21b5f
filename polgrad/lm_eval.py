"""Standard evaluation: the tasks of lm-eval on a model of polgrad.

    python -m polgrad.lm_eval --model=FOLDER --tasks=arc_easy,gsm8k --limit=100 --out=results.json
    python -m polgrad.lm_eval --config=... --workdir=RUN --tasks=my_task --include_path=my_tasks

lm-eval (EleutherAI's lm-evaluation-harness, pip install "polgrad[eval]") makes the prompts and the
scores; `make_lm` is the model that it asks. Log-likelihoods and greedy texts are those of lm-eval's own
backend for transformers. Its tasks download their data; tasks of your own, YAML files in a folder, are
found by --include_path and can read local files. The model is chosen as `polgrad.loading` says.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from polgrad import cli, loading, sharding
from polgrad.build import Experiment
from polgrad.compiling import jit
from polgrad.data.tokenizers import Tokenizer
from polgrad.losses import logit_stats
from polgrad.models.token_stats import token_stats, unembedding
from polgrad.registry import suggest
from polgrad.sampling import stopping
from polgrad.sampling.sampler import behavior_at, make_sampler
from polgrad.types import Array, Params

_TASKS = flags.DEFINE_list('tasks', [], 'Names of tasks, with commas between them.')
_INCLUDE = flags.DEFINE_multi_string(
  'include_path', [], 'Folder with tasks of your own (YAML); repeat the flag for more.'
)
_LIMIT = flags.DEFINE_float(
  'limit', 0, 'Documents of each task; below 1: the fraction of them; 0: all.', lower_bound=0
)
_FEWSHOT = flags.DEFINE_integer(
  'num_fewshot', -1, 'Solved examples in a prompt; -1: as the task says.', lower_bound=-1
)
_BATCH = flags.DEFINE_integer('batch_size', 16, 'Rows that are computed at once.', lower_bound=1)
_CHAT = flags.DEFINE_bool('apply_chat_template', False, 'Put prompts into the chat template.')
_SYSTEM = flags.DEFINE_string('system_instruction', '', 'System turn of the prompts.')
_SAMPLES = flags.DEFINE_bool('log_samples', False, 'Write prompts and answers to --out too.')
_BOOTSTRAP = flags.DEFINE_integer(
  'bootstrap', 1000, 'Resamples for standard errors that have no formula; 0: none.', lower_bound=0
)

MAX_NEW_TOKENS = 256  # of tasks that do not say; lm-eval's default
EXTRA = 'needs lm-eval: pip install "polgrad[eval]"'
Pair = tuple[list[int], list[int]]  # ids of a context, at least one, and of its continuation


@dataclasses.dataclass(frozen=True)
class Model:
  """A policy with its parameters, which scores continuations and generates in batches.

  Requests are sorted by length, and lengths are rounded up by `bucket`, so few programs compile.

  Attributes:
    experiment: policy, tokenizer and mesh.
    params: of the policy.
    rows: rows that are computed at once; a multiple of the mesh's `data_parallel_size`.
  """

  experiment: Experiment
  params: Params
  rows: int

  @property
  def max_length(self) -> int:
    return self.experiment.policy.config.max_length

  def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether it is what greedy decoding draws) of each pair.

    Of a pair with more than `max_length` + 1 tokens the last ones are kept: the last token is only
    predicted, so it takes no place.
    """
    kept = [_last(*pair, self.max_length + 1) for pair in pairs]
    found = [(0.0, True)] * len(pairs)
    for batch in self._batches([len(context + end) for context, end in kept], 'scoring'):
      longest = max(len(kept[i][0] + kept[i][1]) for i in batch)
      width = bucket(longest - 1, self.max_length) + 1
      most = bucket(max(len(kept[i][1]) for i in batch), width - 1)
      tokens = np.full((self.rows, width), self.experiment.tokenizer.pad_id, np.int32)
      segments, scored = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
      for row, i in enumerate(batch):  # rows without a request are padding
        context, end = kept[i]
        length = len(context) + len(end)
        tokens[row, :length] = context + end
        segments[row, :length] = 1
        scored[row, len(context) : length] = True
      arrays = sharding.place_batch(self.experiment.mesh, (tokens, segments, scored))
      with jax.set_mesh(self.experiment.mesh):
        logp, greedy = sharding.to_host(self._forward(self.params, *arrays, most=most))
      for row, i in enumerate(batch):
        found[i] = float(logp[row]), bool(greedy[row])
    return found

  def generate(
    self,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
  ) -> list[list[int]]:
    """The ids of a completion of each prompt, without its stop token; temperature 0 is greedy.

    A prompt that leaves no room for `max_new_tokens` loses its beginning.

    Raises:
      ValueError: `max_new_tokens` leave no room for a prompt.
    """
    room = self.max_length - max_new_tokens
    if room < 1:
      raise ValueError(
        f'{max_new_tokens} new tokens leave no room for a prompt: the model reads {self.max_length}'
      )
    kept = [prompt[-room:] for prompt in prompts]
    sample = self._sampler(max_new_tokens, temperature, top_k, top_p)
    found: list[list[int]] = [[]] * len(prompts)
    for batch in self._batches([len(prompt) for prompt in kept], 'generating'):
      width = bucket(max(len(kept[i]) for i in batch), room)
      # Rows without a request repeat the last one.
      owners = [*batch, *[batch[-1]] * (self.rows - len(batch))]
      tokens = np.full((self.rows, width), self.experiment.tokenizer.pad_id, np.int32)
      mask = np.zeros(tokens.shape, bool)
      for row, i in enumerate(owners):
        tokens[row, width - len(kept[i]) :] = kept[i]
        mask[row, width - len(kept[i]) :] = True
      ids = np.asarray(owners, np.int32)
      seed = self.experiment.seed
      drawn = sharding.to_host(
        sample({'policy': self.params}, tokens, mask, ids, seed=seed, step=0)
      )
      for row, i in enumerate(batch):
        found[i] = [int(t) for t in drawn.tokens[row][drawn.mask[row]]]
        if drawn.finished[row]:
          found[i].pop()
    return found

  def _batches(self, lengths: Sequence[int], what: str) -> Iterator[list[int]]:
    """Numbers of requests, in batches of similar length; the longest come first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = range(0, len(order), self.rows)
    for start in tqdm(starts, desc=what, disable=jax.process_index() > 0):
      yield order[start : start + self.rows]

  @functools.cached_property
  def _forward(self) -> Callable[..., tuple[Array, Array]]:
    """(params, tokens, segment_ids, scored, most=) -> (log-probability f32[B], greedy bool[B])."""
    policy = self.experiment.policy

    def forward(params, tokens, segment_ids, scored, *, most):
      # Nothing is predicted from the last column, which the model may have no place for.
      hidden = policy.hidden(params, tokens[:, :-1], segment_ids[:, :-1])
      stats = token_stats(
        jnp.pad(hidden, ((0, 0), (0, 1), (0, 0))),
        tokens,
        unembedding(policy, params),
        stats={'logp': logit_stats.logp, 'greedy': _greedy},
        where=scored,
        most=most,
      )
      wrong = scored & (stats['greedy'] == 0)
      return jnp.sum(jnp.where(scored, stats['logp'], 0), axis=1), ~jnp.any(wrong, axis=1)

    return jit(forward, static_argnames='most')

  @functools.cached_property
  def _sampler(self) -> Callable[..., Callable]:
    """(max_new_tokens, temperature, top_k, top_p) -> sampler; each is made once."""
    experiment = self.experiment

    @functools.cache
    def make(max_new_tokens, temperature, top_k, top_p):
      behavior_policy, temperature = behavior_at(temperature)
      return make_sampler(
        {'policy': experiment.policy},
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        behavior_policy=behavior_policy,
        mesh=experiment.mesh,
        stop_ids=experiment.tokenizer.stop_ids,
        pad_id=experiment.tokenizer.pad_id,
      )

    return make


def bucket(length: int, most: int) -> int:
  """The least of 32, 48, 64, 96, 128, ... that is at least `length`, but not above `most`.

  >>> [bucket(n, 100) for n in (1, 33, 64, 97)]
  [32, 48, 64, 100]
  """
  size = 32
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return min(size, most)


def _last(context: list[int], end: list[int], most: int) -> Pair:
  """The last `most` tokens of a pair, of which at least one is left in the context."""
  end = end[-(most - 1) :]
  return context[-(most - len(end)) :], end


def _greedy(logits: Array, tokens: Array) -> Array:
  """1.0 where a token is the most likely one, f32[n]."""
  return (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32)


def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
  """The ids of a text; a bos token comes first if the tokenizer puts it there and the text does not."""
  ids = tokenizer.encode(text)
  bos = tokenizer.bos_id
  return [bos, *ids] if special and bos >= 0 and ids[:1] != [bos] else ids


def conversation(tokenizer: Tokenizer, messages: Sequence[dict], prompt: bool) -> str:
  """The text of messages: a prompt for the next turn, or ending within the last turn."""
  text = tokenizer.chat(messages, add_generation_prompt=prompt)
  if prompt:
    return text
  words = messages[-1]['content'].strip()
  return text[: text.rindex(words) + len(words)]


def make_lm(model: Model) -> Any:
  """A `lm_eval.api.model.LM`, which `lm_eval.simple_evaluate` takes as its model.

  Raises:
    ImportError: lm-eval is not installed.
  """
  try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
  except ImportError as error:
    raise ImportError(f'polgrad.lm_eval {EXTRA}') from error
  tokenizer = model.experiment.tokenizer

  class Polgrad(TemplateLM):
    """What lm-eval asks: log-likelihoods of continuations and of whole texts, and generated texts."""

    eot_token_id = tokenizer.stop_ids[0]
    prefix_token_id = tokenizer.context_id if tokenizer.context_id >= 0 else eot_token_id
    tokenizer_name = 'polgrad'  # a part of the names of lm-eval's caches

    def tok_encode(self, string, add_special_tokens=None, **_):
      return encode(tokenizer, string, special=add_special_tokens is not False)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return conversation(tokenizer, chat_history, add_generation_prompt)

    def _loglikelihood_tokens(self, requests, **_):
      return model.score([(context, end) for _, context, end in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      texts = [self.tok_encode(request.args[0]) for request in requests]
      windows = [
        (i, utils.make_disjoint_window(window))
        for i, ids in enumerate(texts)
        for window in utils.get_rolling_token_windows(
          ids, self.prefix_token_id, model.max_length, context_len=1
        )
      ]
      totals = [0.0] * len(texts)
      for (i, _), (logp, _) in zip(windows, model.score([window for _, window in windows])):
        totals[i] += logp
      return totals

    def generate_until(self, requests, disable_tqdm=False):
      return generate_until(model, [request.args for request in requests])

  return Polgrad()


def generate_until(model: Model, requests: Sequence[tuple[str, dict]]) -> list[str]:
  """The texts that follow contexts, each with lm-eval's settings: `until`, `max_gen_toks`, ...

  Requests with the same settings are generated together.
  """
  from lm_eval.models.utils import normalize_gen_kwargs

  tokenizer, groups = model.experiment.tokenizer, {}
  for i, (_, settings) in enumerate(requests):
    groups.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
  texts = [''] * len(requests)
  for members in groups.values():
    asked = normalize_gen_kwargs(requests[members[0]][1], MAX_NEW_TOKENS)
    found = model.generate(
      [encode(tokenizer, requests[i][0]) for i in members],
      max_new_tokens=asked['max_gen_toks'],
      temperature=float(asked.get('temperature', 1.0)) if asked['do_sample'] else 0.0,
      top_k=int(asked.get('top_k') or 0),
      top_p=float(asked.get('top_p') or 1.0),
    )
    for i, ids in zip(members, found):
      texts[i] = stopping.before(tokenizer.decode(ids), asked['until'])
  return texts


def find_tasks(names: Sequence[str], folders: Sequence[str]) -> Any:
  """lm-eval's `TaskManager`, which knows the tasks of these names.

  Raises:
    ImportError: lm-eval is not installed.
    FileNotFoundError: there is no such folder.
    ValueError: no name is given, or there is no task of a name.
  """
  try:
    from lm_eval.tasks import TaskManager
  except ImportError as error:
    raise ImportError(f'polgrad.lm_eval {EXTRA}') from error
  for folder in folders:
    if not os.path.isdir(folder):
      raise FileNotFoundError(f'--include_path: there is no folder {folder}')
  if not names:
    raise ValueError('name tasks: --tasks=arc_easy,gsm8k')
  manager = TaskManager(include_path=[*folders] or None)
  for name in names:
    if name not in manager.all_tasks:
      raise ValueError(f'--tasks: unknown {name!r}{suggest(name, _near(name, manager.all_tasks))}')
  return manager


def _near(name: str, known: Sequence[str]) -> list[str]:
  """At most 20 names that begin like `name`: lm-eval has thousands."""
  begin = [other for other in known if other.startswith(name[:3])]
  return sorted(begin, key=len)[:20]


def evaluate(model: Model, tasks: Sequence[str], manager: Any, **settings: Any) -> dict:
  """lm-eval's results of the tasks; `settings` are those of `lm_eval.simple_evaluate`."""
  import lm_eval

  os.environ['DISABLE_MULTIPROC'] = '1'  # lm-eval would fork this process, and JAX has threads
  return lm_eval.simple_evaluate(
    make_lm(model), tasks=list(tasks), task_manager=manager, batch_size=model.rows, **settings
  )


def main(argv: list[str]) -> None:
  loading.start(argv)
  with cli.refusals():
    folders = [os.path.expanduser(folder) for folder in _INCLUDE.value]
    manager = find_tasks(_TASKS.value, folders)
    experiment, params = loading.load(loading.config())
    size = sharding.data_parallel_size(experiment.mesh)
    model = Model(experiment, params, -(-_BATCH.value // size) * size)
    results = evaluate(
      model,
      _TASKS.value,
      manager,
      limit=_LIMIT.value or None,
      num_fewshot=_FEWSHOT.value if _FEWSHOT.value >= 0 else None,
      apply_chat_template=_CHAT.value,
      system_instruction=_SYSTEM.value or None,
      log_samples=_SAMPLES.value,
      bootstrap_iters=_BOOTSTRAP.value,
    )
  if jax.process_index() == 0:
    show(results, cli.OUT.value)


def show(results: dict, out: str) -> None:
  """Prints lm-eval's table, and writes all results to the file `out`, unless that is ''."""
  from lm_eval.utils import handle_non_serializable, make_table

  print(make_table(results))
  if 'groups' in results:
    print(make_table(results, 'groups'))
  if out:
    path = pathlib.Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=handle_non_serializable))


if __name__ == '__main__':
  cli.run(main)
