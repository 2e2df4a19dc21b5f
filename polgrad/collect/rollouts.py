"""Rollouts: sample, score, remember, credit."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from polgrad import credit as credits
from polgrad.collect import replay as replays
from polgrad.collect.base import Collected, Collector, Context, Draw, make_annotations
from polgrad.collect.scored import (
  Judged,
  demonstrated,
  distinct,
  informative,
  metrics,
  question,
  replace_groups,
  score_rollout,
)
from polgrad.compiling import jit
from polgrad.data import batching
from polgrad.learner import parameter_sets
from polgrad.losses import logit_stats
from polgrad.registry import inputs
from polgrad.sampling import behavior_policies
from polgrad.sampling.sampler import make_sampler
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Outputs, Scored, TrainState

# Of every rollout batch, one number a row: did its verifiers answer, how many collected batches ago
# it was sampled, and a number of its own in [0, 1).
FEATURES = frozenset({'valid', 'staleness', 'uniform'})


def rollouts(
  *,
  prompts: int = 8,
  samples_per_prompt: int = 8,
  prompt_length: int = 64,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  slots: int = 0,
  behavior_policy: behavior_policies.Part = behavior_policies.current,
  recompute_proximal: bool = False,
  max_resamples: int = 0,
  mask_truncated: bool = False,
  lag: int = 0,
  replay: int = 0,
  replay_fraction: float = 0.0,
  baseline_policy: behavior_policies.Part = behavior_policies.greedy,
  baseline_samples: int = 0,
  demonstrations: int = 0,
  stats: Mapping[str, logit_stats.Part] = {},
) -> Collector:
  """Samples `samples_per_prompt` completions for each of `prompts` prompts.

  Args:
    prompt_length: tokens; prompts are left-padded to it, a longer one is an error.
    slots: completions that are decoded at a time (see `make_sampler`); 0 is all of them.
    behavior_policy: the policy itself, greedy, an anchor, or a mixture with one.
    recompute_proximal: take the centre of the ratio from a forward pass of the trainer; otherwise
      it is the sampler's own log-prob.
    max_resamples: dynamic sampling (arXiv:2503.14476): draw further prompts, at most so many times,
      to replace groups whose rewards are all equal.
    mask_truncated: overlong filtering (arXiv:2503.14476): rows that met no stop token keep their say
      in the statistics of their group and leave the loss. Whether they also leave its denominator
      is the aggregation's choice: `constant_length` counts all rows, the others what is masked in.
    lag: asynchronous training (arXiv:2505.24298): a batch is trained on so many collected batches
      after it was sampled. In the first `lag` steps of a phase its first batch is used again. What
      depends on the live policy (values, credit, ...) is computed when a batch is used.
    replay: keep so many batches before that one, ...
    replay_fraction: ... and replace this share of its groups by groups of theirs, drawn anew each step
      (arXiv:2503.18929, arXiv:2507.06892).
    baseline_samples: sample so many further completions of every prompt, which are not trained on;
      their rewards are the feature `baseline_rewards` [B, n]. A prompt whose verifier fails on one
      of them is not trained on either.
    baseline_policy: who draws them: greedy, once, is ReMax (arXiv:2310.10505); the reference, eight
      times, A*-PO (arXiv:2505.20686).
    demonstrations: 1 adds to each group a row with the record's `answer` (arXiv:2504.14945). Its
      `behavior_logp` is 0, and so is `proximal_logp` unless it is recomputed. The same verifiers score
      it, and `Batch.stream` tells it (0) from the sampled rows (1), in the order of the names
      'demonstration' and 'sampled'.
    stats: statistics of the policy's next-token distribution when the batch is used; features
      under their names, for credit and objective.
  """
  _check_rollouts(
    lag, replay, replay_fraction, baseline_policy, baseline_samples, demonstrations, stats
  )
  sampler = dict(
    samples_per_prompt=samples_per_prompt,
    slots=slots,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    behavior_policy=behavior_policy,
  )
  baseline = sampler | dict(samples_per_prompt=baseline_samples, behavior_policy=baseline_policy)
  reads = {*inputs(behavior_policy), *(inputs(baseline_policy) if baseline_samples else ())} - {
    'policy'
  }
  rows_per_prompt = samples_per_prompt + demonstrations
  length = prompt_length + max_new_tokens
  keep = lag + replay + 1 if lag or replay else 0
  return Collector(
    make=functools.partial(
      make_rollouts,
      make_gather=functools.partial(
        _make_sampling,
        records=prompts,
        prompt_length=prompt_length,
        max_resamples=max_resamples,
        sampler=sampler,
        baseline=baseline if baseline_samples else None,
        with_demonstrations=bool(demonstrations),
      ),
      recall=functools.partial(
        replays.recalled, lag=lag, fraction=replay_fraction, rows_per_prompt=rows_per_prompt
      ),
      temperature=temperature,
      recompute_proximal=recompute_proximal,
      mask_truncated=mask_truncated,
      stats=stats,
    ),
    records=prompts,
    rows=prompts * rows_per_prompt,
    rows_per_prompt=rows_per_prompt,
    length=length,
    prompt_length=prompt_length,
    temperature=temperature,
    provides=frozenset({'behavior_logp', 'proximal_logp', 'rewards', *stats})
    | FEATURES
    | ({'baseline_rewards'} if baseline_samples else set())
    | ({'stream'} if demonstrations else set()),
    roles=frozenset(reads),
    filtered=(top_k > 0 or top_p < 1 or _function(behavior_policy) is not behavior_policies.current)
    and not recompute_proximal,
    init=functools.partial(
      _empty_memory, prompts * rows_per_prompt, length, keep, baseline_samples, demonstrations
    ),
  )


def _check_rollouts(lag, replay, share, baseline_policy, baseline_samples, demonstrations, stats):
  counts = {'lag': lag, 'replay': replay, 'baseline_samples': baseline_samples}
  for name, value in counts.items():
    if value < 0:
      raise ValueError(f'rollouts: {name} must be at least 0, got {value}')
  if not 0 <= share <= 1 or bool(share) != bool(replay):
    raise ValueError(
      f'rollouts: replay_fraction must be 0 without replay, and in (0, 1] with it; got replay={replay}, '
      f'replay_fraction={share}'
    )
  if _function(baseline_policy) is not behavior_policies.greedy and not baseline_samples:
    raise ValueError('rollouts: baseline_policy draws nothing, because baseline_samples is 0')
  if demonstrations not in (0, 1):
    raise ValueError(
      f'rollouts: demonstrations must be 0 or 1, got {demonstrations}: a record has one answer'
    )
  taken = {*FEATURES, 'baseline_rewards'}
  for holder in (Batch, Scored, Outputs):
    taken |= holder.__dataclass_fields__.keys()
  for name, stat in stats.items():
    if name in taken:
      raise ValueError(f'rollouts: stats.{name}: the name is taken; taken are {sorted(taken)}')
    if 'teacher_logits' in inputs(stat):
      raise ValueError(f'rollouts: stats.{name} reads teacher_logits; only the policy is there')


def _function(fn: Callable) -> Callable:
  return getattr(fn, 'func', fn)


class Gathered(NamedTuple):
  """What a step sampled, and what it has to say about it."""

  judged: Judged  # what the policy made
  rows: replays.Rows  # all rows to train on, now or later: the fields of `Scored`, and more
  metrics: dict[str, float]
  messages: list[str]


def make_rollouts(
  context: Context,
  *,
  make_gather: Callable,
  temperature: float,
  recompute_proximal: bool,
  mask_truncated: bool,
  recall: Callable | None = None,
  stats: Mapping[str, Callable] = {},
) -> Callable:
  gather = make_gather(context)
  annotate = make_annotations(
    context, temperature, recompute_proximal=recompute_proximal, stats=stats
  )
  assign = jit(functools.partial(credits.assign, context.credit))

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    judged, rows, report, messages = gather(state, draw, step)
    random = np.random.default_rng((context.seed, step, 1))  # minibatches take (seed, step)
    rows = rows | {'sampled_at': np.full(len(rows['rewards']), step, np.int32)}
    memory = to_host(state.collect_state)
    if memory:
      memory = replays.stored(memory, rows)
      rows = recall(memory, random=random)
    staleness = (step - rows.pop('sampled_at')).astype(np.float32)
    rows |= {'staleness': staleness, 'uniform': random.random(len(staleness), np.float32)}
    rows['proximal_logp'] = rows['behavior_logp']
    rows |= annotate(state, rows['tokens'], rows['segment_ids'], rows['mask'])
    credited, credit_state = to_host(assign(rows, to_host(state.credit_state)))
    rows |= credited
    if mask_truncated:
      rows['mask'] = rows['mask'] & rows['finished'][:, None]
    samples_per_prompt = len(judged.texts) // len(judged.records)
    samples = [
      (question(judged.records[i // samples_per_prompt]), text, float(judged.scored.rewards[i]))
      for i, text in enumerate(judged.texts)
    ]
    report |= {'staleness': float(staleness.mean())}
    batch = as_batch(rows).replace(layout=context.layout)
    return Collected(batch, credit_state, memory, report, samples, messages)

  return collect


UNREAD = ('finished', 'prompt_ids', 'policy_step')


def as_batch(rows: Mapping[str, Array]) -> Batch:
  """Arrays by name to a batch: those that are no field of it become features."""
  own = Batch.__dataclass_fields__
  features = {name: x for name, x in rows.items() if name not in own and name not in UNREAD}
  return Batch(**{name: x for name, x in rows.items() if name in own}, features=features)


def as_rows(scored: Scored) -> replays.Rows:
  """The fields of a scored rollout by name."""
  return {name: getattr(scored, name) for name in Scored.__dataclass_fields__}


def _empty_memory(
  rows: int, length: int, capacity: int, baseline_samples: int, demonstrations: int
) -> replays.Ring | tuple:
  """Room for the rows of `capacity` batches, in the shapes that `_make_sampling` gives them."""
  if not capacity:
    return ()
  shapes = {
    'int32': dict.fromkeys(('tokens', 'segment_ids'), (rows, length))
    | dict.fromkeys(('prompt_ids', 'group_ids', 'policy_step', 'sampled_at'), (rows,))
    | ({'stream': (rows,)} if demonstrations else {}),
    'float32': {'behavior_logp': (rows, length), 'rewards': (rows,)}
    | ({'baseline_rewards': (rows, baseline_samples)} if baseline_samples else {}),
    'bool': {'mask': (rows, length), 'finished': (rows,), 'valid': (rows,)},
  }
  like = {n: np.zeros(x, dtype) for dtype, named in shapes.items() for n, x in named.items()}
  return replays.empty(like, capacity=capacity)


def _make_sampling(
  context: Context,
  *,
  records: int,
  prompt_length: int,
  max_resamples: int,
  sampler: Mapping,
  baseline: Mapping | None,
  with_demonstrations: bool,
) -> Callable:
  """(state, draw, step) -> Gathered: one draw, and what stands beside it."""
  samples_per_prompt = sampler['samples_per_prompt']
  sample = _make_judging(context, prompt_length, sampler)
  # A seed that no phase has: a baseline must not draw what it is compared with.
  sample_baseline = baseline and _make_judging(context, prompt_length, baseline, ~context.seed)

  def demonstrate(state: TrainState, judged: Judged) -> Judged:
    rollout = demonstrated(
      judged.records,
      context.tokenizer,
      prompt_length=prompt_length,
      max_new_tokens=sampler['max_new_tokens'],
      policy_step=int(state.step),
    )
    return score_rollout(rollout, judged.records, context)

  def gather(state: TrainState, draw: Draw, step: int) -> Gathered:
    judged = sample(state, draw(records), step)
    for _ in range(max_resamples):
      useful = informative(judged.scored, samples_per_prompt)
      if useful.all():
        break
      judged = replace_groups(
        judged, sample(state, draw(records), step), useful, samples_per_prompt
      )
    rows, report, beside = as_rows(judged.scored), metrics(judged), {}
    if with_demonstrations:
      beside['demonstration'] = shown = demonstrate(state, judged)
      pair = lambda x, y: np.concatenate(
        [x.reshape(records, samples_per_prompt, *x.shape[1:]), y[:, None]], 1
      )
      join = lambda x, y: pair(x, y).reshape(-1, *x.shape[1:])
      rows = jax.tree.map(join, rows, as_rows(shown.scored))
      rows['stream'] = np.tile(np.array([1] * samples_per_prompt + [0], np.int32), records)
    if sample_baseline:
      beside['baseline'] = other = sample_baseline(state, judged.records, step)
      each = len(rows['rewards']) // records
      spread = lambda x: np.repeat(x.reshape(records, -1), each, axis=0)
      rows['baseline_rewards'] = spread(other.scored.rewards)
      rows['valid'] = rows['valid'] & spread(other.scored.valid).all(axis=1)
    messages = list(judged.scores.messages)
    for name, one in beside.items():
      report[f'reward_of_{name}'] = metrics(one)['reward']
      report['verifier_errors'] += metrics(one)['verifier_errors']
      messages += one.scores.messages
    return Gathered(judged, rows, report, messages)

  return gather


def _make_judging(
  context: Context, prompt_length: int, sampler: Mapping, seed: int | None = None
) -> Callable:
  """(state, records, step) -> Judged, by the sampler of these settings."""
  tokenizer = context.tokenizer
  names = inputs(sampler['behavior_policy'])
  sample = make_drawer(context, sampler)

  def judge(state: TrainState, records: Sequence[dict], step: int) -> Judged:
    prompts = batching.prompts(records, tokenizer, length=prompt_length)
    params = parameter_sets(state, context.frozen)
    rollout = sample(
      {name: params[name] for name in names},
      prompts.tokens,
      prompts.mask,
      distinct(prompts.ids),
      seed=context.seed if seed is None else seed,
      step=step,
      policy_step=int(state.step),
    )
    ids = np.repeat(prompts.ids, sampler['samples_per_prompt'])
    return score_rollout(to_host(rollout).replace(prompt_ids=ids), prompts.records, context)

  return judge


def make_drawer(context: Context, settings: Mapping) -> Callable:
  """The sampler of these settings, with the tokenizer and the devices of the run."""
  tokenizer = context.tokenizer
  return make_sampler(
    context.frozen,
    default=context.policy,
    mesh=context.mesh,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
    **settings,
  )
