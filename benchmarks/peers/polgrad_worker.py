"""polgrad's part of `benchmarks.compare`: trains on the work of a folder, prints seconds as JSON.

    python -m benchmarks.peers.polgrad_worker FOLDER grpo|dpo|sft|rollout

The step is the trainer's own: collector, jitted update with donated state. Prompts are shared
(`share_prompts`), and the sampler's log-probs are the behaviour policy's, as in any polgrad run. Of a
rollout alone, the parameters are float32 as in training, and `dtype` is that of the computation. Where
completions end, their lengths are left in the folder for the peer.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import (
  build,
  collect,
  compiling,
  credit,
  models,
  objectives,
  optim,
  phases,
  sharding,
)
from polgrad.collect import base
from polgrad.data import sources, tokenizers
from polgrad.losses import (
  advantages,
  aggregation,
  implicit_rewards,
  penalties,
  preference_losses,
  surrogates,
)
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies, make_sampler
from polgrad.types import Batch

SPENT = collections.defaultdict(list)  # seconds by part of a step


class Timed:
  """A function that waits for its result and records the seconds; it has the function's attributes."""

  def __init__(self, name: str, function: Callable):
    self.name, self.function = name, function

  def __call__(self, *args, **kwargs):
    start = time.perf_counter()
    out = jax.block_until_ready(self.function(*args, **kwargs))
    SPENT[self.name].append(time.perf_counter() - start)
    return out

  def __getattr__(self, name: str):
    return getattr(self.function, name)


def fraction_of_even(completion: str) -> float:
  """The fraction of a completion's tokens with an even id."""
  ids = [int(word[1:]) for word in completion.split()]
  return sum(i % 2 == 0 for i in ids) / len(ids)


def phase_of(kind: str, work: dict) -> dict:
  """The phase of a kind of training; its data is handed over below."""
  adamw = part(optim.adamw, learning_rate=work['learning_rate'])
  reference = {'reference': part(optim.fixed)}
  if kind == 'grpo':
    return part(
      build.Phase,
      source=part(sources.arithmetic),
      collect=part(
        collect.Rollouts,
        prompts=len(work['prompts']),
        samples_per_prompt=work['samples'],
        prompt_length=work['prompt_length'],
        max_new_tokens=work['new_tokens'],
      ),
      reward={'even': weighted(1.0, part(fraction_of_even))},
      credit=part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6)),
      objective=part(
        objectives.PolicyGradient,
        surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
        aggregation=part(aggregation.sequence_mean),
        penalties={'kl': weighted(work['beta'], part(penalties.k3))},
      ),
      anchors=reference,
      optimizer=adamw,
      share_prompts=True,
    )
  if kind == 'dpo':
    score, link = part(implicit_rewards.log_ratio_sum), part(preference_losses.logistic)
    objective = part(objectives.Pairwise, score=score, link=link, beta=work['dpo_beta'])
    rows = part(
      collect.Preferences,
      pairs=len(work['chosen']),
      length=len(work['chosen'][0]),
      prompt_length=work['prompt_length'],
    )
  else:
    objective = part(objectives.Supervised, aggregation=part(aggregation.token_mean))
    rows = part(collect.Demonstrations, rows=len(work['sft']), length=len(work['sft'][0]))
  return part(
    build.Phase,
    source=part(sources.arithmetic),
    collect=rows,
    objective=objective,
    anchors=reference if kind == 'dpo' else {},
    optimizer=adamw,
    share_prompts=kind == 'dpo',
  )


def words(vocabulary: int) -> tokenizers.Tokenizer:
  """'t5 t17' <-> [5, 17]; the stop token lies outside the model's vocabulary."""
  return tokenizers.byte()._replace(
    encode=lambda text: [int(word[1:]) for word in text.split()],
    decode=lambda ids: ' '.join(f't{i}' for i in ids),
    pad_id=0,
    bos_id=-1,
    stop_ids=(vocabulary,),
  )


def make_collect(experiment: build.Experiment, kind: str, work: dict) -> Callable:
  """(state, step) -> the batch of a step."""
  phase = experiment.phases['main']
  context = phases.context(experiment, phase, 0)
  if kind == 'grpo':
    records = [
      {'id': i, 'prompt': ' '.join(f't{t}' for t in ids)} for i, ids in enumerate(work['prompts'])
    ]
    steps = phase.collect.make(context).__self__
    rows = dataclasses.replace(steps.draw_rows, draw=Timed('rollout', steps.draw_rows.draw))
    steps = dataclasses.replace(steps, draw_rows=rows, annotate=Timed('reference', steps.annotate))
    return lambda state, step: steps.collect(state, lambda _: records, step).batch
  if kind == 'dpo':
    rows = np.stack([work['chosen'], work['rejected']], axis=1).reshape(-1, len(work['chosen'][0]))
    start, group = work['prompt_length'], 2
  else:
    rows, start, group = np.asarray(work['sft']), 1, 1
  index = np.arange(len(rows), dtype=np.int32)
  batch = Batch(
    tokens=rows.astype(np.int32),
    segment_ids=np.ones(rows.shape, np.int32),
    mask=np.broadcast_to(np.arange(rows.shape[1]) >= start, rows.shape),
    group_ids=index // group,
    label=(1 - index % group).astype(np.float32) if kind == 'dpo' else None,
    layout=context.layout,
  )
  annotate = base.make_annotator(context, 1.0)
  if kind == 'dpo':  # SFT has no reference
    annotate = Timed('reference', annotate)
  return lambda state, step: annotate(state, batch)


def prepare(folder: pathlib.Path, kind: str) -> tuple[dict, build.Experiment]:
  """The work of a folder, and the experiment that trains on it."""
  work = json.loads((folder / 'data.json').read_text())
  work |= json.loads((folder / 'workload.json').read_text())
  config = part(
    build.Experiment,
    tokenizer=part(tokenizers.byte),
    model=part(models.pretrained, path=str(folder / 'model')),
    phases={'main': phase_of(kind, work)},
    order=('main',),
  )
  return work, dataclasses.replace(build.build(config), tokenizer=words(work['vocabulary']))


def run(folder: pathlib.Path, kind: str) -> dict:
  work, experiment = prepare(folder, kind)
  with jax.set_mesh(experiment.mesh):
    state = phases.begin(experiment, 0, None)
    gather = make_collect(experiment, kind, work)
    update = Timed('update', phases.jit_update(experiment, experiment.phases['main'], state))
    reports = []
    for step in range(work['steps']):
      start = time.perf_counter()
      if step == 0:
        phase = experiment.phases['main']
        phase.score.begin(phase.collect.rows)
        update.ahead(state, phase, experiment.mesh)
      batch = gather(state, step)
      state, report = update(state, sharding.place_batch(experiment.mesh, batch))
      reports.append(sharding.to_host(report))
      SPENT['step'].append(time.perf_counter() - start)
  return {
    'framework': 'polgrad',
    'version': f'jax {importlib.metadata.version("jax")}',
    'kind': kind,
    'first': {name: spent[0] for name, spent in SPENT.items()},
    'seconds': {name: spent[1:] for name, spent in SPENT.items()},
    'tokens': int(np.sum(batch.mask)),
    'loss': float(reports[0]['loss']),
    'grad_norm': float(reports[0]['grad_norm']),
    'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


def sample(folder: pathlib.Path) -> dict:
  """Rollouts alone."""
  work = json.loads((folder / 'data.json').read_text())
  work |= json.loads((folder / 'workload.json').read_text())
  begin = time.perf_counter()
  policy = models.pretrained(path=str(folder / 'model'), dtype=work['dtype'])
  params, stop = policy.init(jax.random.key(0)), work['vocabulary'] - 1

  def ending(policy):
    """Ends with probability 1 / mean at each token."""
    others = jnp.where(jnp.arange(policy.shape[-1]) == stop, -jnp.inf, policy)
    end = jnp.log(1 / (work['mean'] - 1)) + jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(policy.shape[-1]) == stop, end, policy)

  draw = make_sampler(
    {'policy': policy},
    max_new_tokens=work['new_tokens'],
    samples_per_prompt=work['samples'],
    behavior_policy=ending if work['mean'] else behavior_policies.current,
    stop_ids=(stop,) if work['mean'] else (),
    slots=work['at_once'],
  )
  tokens = np.array(work['prompts'], np.int32)
  rows = tokens, np.ones(tokens.shape, bool), np.arange(len(tokens))
  roll = Timed('rollout', lambda: sharding.to_host(draw({'policy': params}, *rows, seed=0, step=0)))
  cpu = []
  for _ in range(work['steps']):
    start = time.process_time()
    batch = roll()
    cpu.append(time.process_time() - start)
  # The first one includes loading and compiling.
  first, *later = SPENT['rollout']
  first += time.perf_counter() - begin - first - sum(later)
  (folder / 'lengths.json').write_text(json.dumps(batch.mask.sum(axis=1).tolist()))
  return {
    'framework': 'polgrad',
    'version': f'jax {importlib.metadata.version("jax")}',
    'kind': 'rollout',
    'first': {'rollout': first},
    'seconds': {'rollout': later, 'cpu': cpu[1:]},
    'tokens': int(np.sum(batch.mask)),
    'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


if __name__ == '__main__':
  compiling.prepare()
  place = pathlib.Path(sys.argv[1])
  work = sample if sys.argv[2] == 'rollout' else functools.partial(run, kind=sys.argv[2])
  print(json.dumps(compiling.in_one_chunk(work)(place)))
