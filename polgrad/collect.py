"""Collectors: from data records to the batch of one training step.

`rollouts` samples, scores and credits; `demonstrations` and `preferences` read completions off the
data. All end in the same `Batch`, so reinforcement, preference learning, distillation and
supervised learning share one loop.

Batches live on the host, as NumPy: rewards, groups and credit belong to the whole rollout, which is
small next to the model, and every process sees all of it. Only model work is spread over the mesh.
"""

import collections
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from polgrad import credit as credits
from polgrad import sharding
from polgrad.data import batching
from polgrad.data.tokenizers import Tokenizer
from polgrad.learner import make_annotate, parameter_sets
from polgrad.models.policy import Policy
from polgrad.objectives import Objective
from polgrad.registry import inputs, table
from polgrad.rewards.scoring import Scores
from polgrad.sampling import roles
from polgrad.sampling.sampler import make_sampler
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Rollout, Scored, TrainState

Draw = Callable[[int], list[dict]]


class Context(NamedTuple):
  """What a collector may use."""

  policy: Policy
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  seed: int
  objective: Objective
  credit: credits.Estimator
  score: Callable[[Sequence[str], Sequence[dict], Sequence[int]], Scores]
  frozen: Mapping[str, Policy]  # anchors that are models of their own
  micro_batches: int


class Collected(NamedTuple):
  """One step's data and what to report of it."""

  batch: Batch  # NumPy
  credit_state: Any
  metrics: dict[str, float]
  samples: list[tuple[str, str, float]]  # prompt, completion, reward
  messages: list[str]  # what verifiers complained of


class Collector(NamedTuple):
  """How a phase gets its batches.

  Attributes:
    make: context -> (state, draw, step) -> Collected, where draw(n) gives the next n records.
    records: data records a step.
    rows: rows of the batch that they become.
    group: rows of one record; they stay together.
    length: positions of a row.
    temperature: of sampling, and therefore of all log-probs.
    provides: the `Batch` fields that are there without credit or anchors.
    roles: anchors that the sampler reads besides the policy.
    filtered: sampling leaves tokens out (top-k, top-p, greedy, mixtures), so the policy's own
      log-probs are not those of the sampler.
  """

  make: Callable
  records: int
  rows: int
  group: int
  length: int
  temperature: float
  provides: frozenset[str]
  roles: frozenset[str] = frozenset()
  filtered: bool = False


def rollouts(
  *,
  prompts: int = 8,
  group: int = 8,
  prompt_length: int = 64,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  role: roles.Part = roles.current,
  recompute_proximal: bool = False,
  max_resamples: int = 0,
  mask_truncated: bool = False,
) -> Collector:
  """Samples `group` completions for each of `prompts` prompts.

  Args:
    prompt_length: tokens; prompts are left-padded to it, a longer one is an error.
    role: the policy itself, greedy, or a mixture with an anchor.
    recompute_proximal: take the centre of the ratio from a forward pass of the trainer; otherwise
      it is the sampler's own log-prob.
    max_resamples: dynamic sampling (arXiv:2503.14476): draw further prompts, at most so many times,
      to replace groups whose rewards are all equal.
    mask_truncated: overlong filtering (arXiv:2503.14476): rows that met no stop token keep their say
      in the statistics of their group and leave the loss. Whether they also leave its denominator
      is the aggregation's choice: `constant_length` counts all rows, the others what is masked in.
  """
  reads = frozenset(inputs(role)) - {'policy'}
  return Collector(
    make=functools.partial(
      _make_rollouts,
      records=prompts,
      prompt_length=prompt_length,
      max_resamples=max_resamples,
      mask_truncated=mask_truncated,
      recompute_proximal=recompute_proximal,
      sampler=dict(
        group_size=group,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        role=role,
      ),
    ),
    records=prompts,
    rows=prompts * group,
    group=group,
    length=prompt_length + max_new_tokens,
    temperature=temperature,
    provides=frozenset({'behavior_logp', 'proximal_logp', 'rewards'}),
    roles=reads,
    filtered=(top_k > 0 or top_p < 1 or _function(role) is not roles.current)
    and not recompute_proximal,
  )


def demonstrations(*, rows: int = 32, length: int = 128) -> Collector:
  """`rows` prompts with their `answer`, each of at most `length` tokens."""
  return Collector(
    make=functools.partial(_make_data, layout=batching.supervised, length=length, records=rows),
    records=rows,
    rows=rows,
    group=1,
    length=length,
    temperature=1.0,
    provides=frozenset(),
  )


def preferences(*, pairs: int = 16, length: int = 128) -> Collector:
  """`pairs` prompts with a `chosen` and a `rejected` completion: two rows each, chosen first."""
  return Collector(
    make=functools.partial(_make_data, layout=batching.pairs, length=length, records=pairs),
    records=pairs,
    rows=2 * pairs,
    group=2,
    length=length,
    temperature=1.0,
    provides=frozenset({'label'}),
  )


TABLE = table(rollouts, demonstrations, preferences)
Part = Annotated[Collector, TABLE]


def _function(fn: Callable) -> Callable:
  return getattr(fn, 'func', fn)


def _make_data(context: Context, *, layout: Callable, length: int, records: int) -> Callable:
  annotate = _make_annotations(context, 1.0)

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    del step
    batch = layout(draw(records), context.tokenizer, length=length)
    batch = batch.replace(**annotate(state, batch.tokens, batch.segment_ids))
    metrics = {'length': float(batch.mask.sum() / len(batch.mask))}
    return Collected(batch, to_host(state.credit_state), metrics, [], [])

  return collect


def _make_rollouts(
  context: Context,
  *,
  records: int,
  prompt_length: int,
  max_resamples: int,
  mask_truncated: bool,
  recompute_proximal: bool,
  sampler: Mapping,
) -> Callable:
  tokenizer = context.tokenizer
  names = inputs(sampler['role'])
  sample = make_sampler(
    context.frozen,
    default=context.policy,
    mesh=context.mesh,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
    **sampler,
  )
  annotate = _make_annotations(
    context, sampler['temperature'], recompute_proximal=recompute_proximal
  )
  assign = jax.jit(functools.partial(credits.assign, context.credit))
  group = sampler['group_size']

  def sample_and_score(state: TrainState, records: Sequence[dict], step: int) -> Judged:
    prompts = batching.prompts(records, tokenizer, length=prompt_length)
    params = parameter_sets(state, context.frozen)
    rollout = sample(
      {name: params[name] for name in names},
      prompts.tokens,
      prompts.mask,
      distinct(prompts.ids),
      seed=context.seed,
      step=step,
      policy_step=int(state.step),
    )
    rollout = to_host(rollout).replace(prompt_ids=np.repeat(prompts.ids, group))
    return score_rollout(rollout, prompts.records, context)

  def collect(state: TrainState, draw: Draw, step: int) -> Collected:
    judged = sample_and_score(state, draw(records), step)
    for _ in range(max_resamples):
      useful = informative(judged.scored, group)
      if useful.all():
        break
      judged = replace_groups(judged, sample_and_score(state, draw(records), step), useful, group)
    scored = judged.scored
    arrays = {name: getattr(scored, name) for name in ('mask', 'rewards', 'valid', 'group_ids')}
    found = {'proximal_logp': scored.behavior_logp}
    found |= annotate(state, scored.tokens, scored.segment_ids)
    fields, credit_state = to_host(assign(arrays | found, to_host(state.credit_state)))
    if mask_truncated:
      fields['mask'] = fields['mask'] & scored.finished[:, None]
    batch = Batch(
      tokens=scored.tokens,
      segment_ids=scored.segment_ids,
      group_ids=scored.group_ids,
      behavior_logp=scored.behavior_logp,
      rewards=scored.rewards,
      **found,
      **fields,
    )
    samples = [
      (question(judged.records[i // group]), text, float(scored.rewards[i]))
      for i, text in enumerate(judged.texts)
    ]
    return Collected(
      batch, credit_state, _rollout_metrics(scored, judged.scores), samples, judged.scores.messages
    )

  return collect


def distinct(ids: np.ndarray) -> np.ndarray:
  """Ids for sampling keys: a prompt that stands twice in a batch must not draw the same noise."""
  seen = collections.Counter()
  out = []
  for i in ids.tolist():
    out.append((i + seen[i] * 0x9E3779B1) % 2**31)  # a step far beyond any data set's rows
    seen[i] += 1
  return np.asarray(out, np.int32)


def informative(scored: Scored, group: int) -> np.ndarray:
  """bool[N]: groups whose rewards are not all equal, so that a group baseline leaves something."""
  rewards = np.where(scored.valid, scored.rewards, np.nan).reshape(-1, group)
  with warnings.catch_warnings(action='ignore', category=RuntimeWarning):  # a group of failures
    return np.nanmax(rewards, axis=1) > np.nanmin(rewards, axis=1)


def replace_groups(old: 'Judged', new: 'Judged', useful: np.ndarray, group: int) -> 'Judged':
  """Puts informative groups of `new` in the place of uninformative ones of `old`."""
  places = np.flatnonzero(~useful)
  spare = np.flatnonzero(informative(new.scored, group))
  source = np.arange(len(useful))
  source[places[: len(spare)]] = len(useful) + spare[: len(places)]
  rows = (source[:, None] * group + np.arange(group)[None, :]).reshape(-1)
  pick = lambda a, b: np.concatenate([a, b])[rows]
  scored = jax.tree.map(pick, old.scored, new.scored)
  names = np.repeat(np.arange(len(useful), dtype=np.int32), group)
  scores = new.scores._replace(
    total=pick(old.scores.total, new.scores.total),
    components=jax.tree.map(pick, old.scores.components, new.scores.components),
    valid=pick(old.scores.valid, new.scores.valid),
    errors=dict(collections.Counter(old.scores.errors) + collections.Counter(new.scores.errors)),
    messages=old.scores.messages + new.scores.messages,
  )
  texts, records = old.texts + new.texts, old.records + new.records
  return Judged(
    scored=scored.replace(group_ids=names),
    scores=scores,
    texts=[texts[i] for i in rows],
    records=[records[i] for i in source],
  )


class Judged(NamedTuple):
  """A rollout on the host with its rewards, texts and data rows."""

  scored: Scored
  scores: Scores
  texts: list[str]  # [B]
  records: list[dict]  # [N]


def question(record: Mapping) -> str:
  """What a table of samples shows of a record."""
  return record['prompt'] if 'prompt' in record else record['messages'][-1]['content']


def score_rollout(rollout: Rollout, records: Sequence[dict], context: Context) -> Judged:
  """Decodes and scores a rollout on the host; each process judges its share of the rows."""
  texts = completions(rollout, context.tokenizer)
  lengths = rollout.mask.sum(axis=1)
  group = len(texts) // len(records)
  processes, own = jax.process_count(), jax.process_index()
  rows = range(own, len(texts), processes)
  scores = context.score(
    [texts[i] for i in rows], [records[i // group] for i in rows], [int(lengths[i]) for i in rows]
  )
  if processes > 1:
    scores = _gather_scores(scores, len(texts))
  scored = Scored(
    rewards=np.where(scores.valid, scores.total, 0.0).astype(np.float32),
    valid=scores.valid,
    **{name: getattr(rollout, name) for name in Rollout.__dataclass_fields__},
  )
  return Judged(scored, scores, texts, list(records))


def _gather_scores(scores: Scores, rows: int) -> Scores:
  """Interleaves the processes' shares; error counts and messages stay those of this process."""
  processes = jax.process_count()
  share = -(-rows // processes)

  def gather(x: np.ndarray) -> np.ndarray:
    padded = np.zeros(share, np.float64)
    padded[: len(x)] = x
    return multihost_utils.process_allgather(padded).T.reshape(-1)[:rows]

  return scores._replace(
    total=gather(scores.total),
    components={k: gather(v) for k, v in sorted(scores.components.items())},
    valid=gather(scores.valid) > 0,
  )


def completions(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
  """The text of each row's completion, without the stop token that ended it."""
  texts = []
  for tokens, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished):
    ids = [int(i) for i in tokens[mask]]
    texts.append(tokenizer.decode(ids[:-1] if finished else ids))
  return texts


def _rollout_metrics(scored: Scored, scores: Scores) -> dict[str, float]:
  valid = scored.valid
  mean = lambda x: float(np.mean(x[valid])) if valid.any() else float('nan')
  rewards = scored.rewards
  _, group = np.unique(scored.group_ids, return_inverse=True)
  spread = [np.ptp(rewards[(group == g) & valid]) for g in set(group[valid])]
  return {
    'reward': mean(rewards),
    **{f'reward/{name}': mean(value) for name, value in scores.components.items()},
    'reward/same_in_group': float(np.mean(np.array(spread) == 0)) if spread else float('nan'),
    'length': float(scored.mask.sum(axis=1).mean()),
    'truncated': float(1 - scored.finished.mean()),
    'verifier_errors': float(len(valid) - valid.sum()),
    **{f'verifier_errors/{name}': float(n) for name, n in scores.errors.items()},
  }


# Which parameter set a log-prob of the batch is taken under.
ANCHOR_OF = {'reference_logp': 'reference', 'teacher_logp': 'teacher'}


def _make_annotations(
  context: Context, temperature: float, *, recompute_proximal: bool = False
) -> Callable:
  """(state, tokens, segment_ids) -> the log-probs and values that objective or credit read."""
  wanted = context.objective.requires | context.credit.requires
  make = lambda policy, fields: jax.jit(
    make_annotate(
      policy, fields=fields, temperature=temperature, micro_batches=context.micro_batches
    )
  )
  own = wanted & {'old_values'} | (wanted & {'proximal_logp'} if recompute_proximal else set())
  of_policy = make(context.policy, frozenset({'values'} if 'old_values' in own else ()))
  of_anchor = {
    field: make(context.frozen.get(anchor, context.policy), frozenset())
    for field, anchor in ANCHOR_OF.items()
    if field in wanted
  }

  def annotate(state: TrainState, tokens: Array, segment_ids: Array) -> dict[str, np.ndarray]:
    rows = sharding.place_batch(context.mesh, (tokens, segment_ids))
    found = {}
    if own:
      outputs = of_policy(state.params, *rows)
      named = {'proximal_logp': outputs.logp, 'old_values': outputs.values}
      found |= {name: named[name] for name in own}
    params = parameter_sets(state, context.frozen)
    for field, function in of_anchor.items():
      found[field] = function(params[ANCHOR_OF[field]], *rows).logp
    return to_host(found)

  return annotate


def minibatches(
  batch: Batch, *, epochs: int, parts: int, group: int, seed: Sequence[int]
) -> list[Batch]:
  """`epochs` passes over the batch, each cut at random into `parts`; groups stay whole.

  With one part the rows keep their order.
  """
  groups = np.arange(len(batch.tokens)).reshape(-1, group)
  random = np.random.default_rng(seed)
  cuts = []
  for _ in range(epochs):
    order = random.permutation(len(groups)) if parts > 1 else np.arange(len(groups))
    cuts += [groups[np.sort(piece)].reshape(-1) for piece in np.split(order, parts)]
  return [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in cuts]
