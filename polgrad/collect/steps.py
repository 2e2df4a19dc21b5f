"""The five steps of every collector that samples: sample, score, remember, annotate, credit."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polgrad import credit as credits
from polgrad import curricula, exchanges, speed
from polgrad.collect.base import Annotator, Collected, Context, Draw, Sampling, make_annotator
from polgrad.collect.drawn import Drawn, Episode
from polgrad.collect.influences import Measure, make_influences
from polgrad.collect.scored import Texts, metrics, score_rows, shown
from polgrad.compiling import jit
from polgrad.rewards.scoring import Scores
from polgrad.sharding import to_host
from polgrad.types import STREAMS, Batch, Layout, TrainState

# What every batch of sampled rows has without credit or anchors.
PROVIDED = frozenset({
  *('behavior_logp', 'finished', 'prompt_ids', 'sampled_at', 'rewards', 'valid'),
  *('staleness', 'proximal_logp', 'uniform'),
})  # fmt: skip

FAR = 20.0  # nats: a ratio of policies larger than exp of this is counted as this


class Report(NamedTuple):
  """What to report of the rows that a step sampled, whether or not it trains on them."""

  metrics: dict[str, float]
  samples: list[tuple[str, str, float]]  # prompt, completion, reward
  messages: list[str]  # of verifiers that failed
  terms: dict[str, np.ndarray]  # f[B], terms of the rewards; NaN where a verifier failed
  episodes: Sequence[Episode] = ()  # [B]; () without an environment
  sampled: curricula.Sampled | None = None  # of the policy, without those that credit alone reads

  @classmethod
  def of(cls, batch: Batch, texts: Texts) -> 'Report':
    """The report of scored rows that the policy sampled."""
    scores = texts.scores
    return cls(
      metrics(batch, scores, texts.episodes),
      shown(batch, texts),
      list(scores.messages),
      scores.components,
      texts.episodes,
      sampled_of(batch, texts),
    )

  def beside(self, name: str, batch: Batch, scores: Scores) -> 'Report':
    """Adds the mean reward and the failures of further rows, such as demonstrations."""
    found = metrics(batch, scores)
    added = {f'reward_of_{name}': found['reward']}
    for errors in ('verifier_errors', 'environment_errors'):
      if errors in self.metrics:
        added[errors] = self.metrics[errors] + found.get(errors, 0.0)
    return self._replace(metrics=self.metrics | added, messages=self.messages + scores.messages)

  def with_errors(self, errors: Mapping[str, int], messages: list[str]) -> 'Report':
    """Adds the failures of comparisons."""
    before = self.metrics['verifier_errors']
    added = {f'verifier_errors/{name}': float(n) for name, n in errors.items()}
    added['verifier_errors'] = before + sum(errors.values())
    return self._replace(metrics=self.metrics | added, messages=self.messages + messages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(abc.ABC):
  """Collects one batch a call, with functions that are compiled once a phase.

  A subclass says how rows are sampled, and may add to scoring and remembering.
  """

  context: Context
  annotate: Annotator  # (state, batch) -> batch with log-probs, values and statistics
  assign: Callable[[Batch, Any], tuple[Batch, Any]]  # compiled: (batch, state) -> credited, state
  mask_truncated: bool  # whether rows that met no stop token leave the loss
  influences: Measure | None = None  # what credit reads of gradients; None: it reads none
  meter: speed.Meter = dataclasses.field(default_factory=speed.Meter)

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    """The batch of a step; `step` is the number of batches collected in the phase before it."""
    batch, report = self.fresh(self.lent(state), draw, step)
    return self.completed(batch, report, to_host(state.collect_state), state, step)

  def completed(
    self, batch: Batch, report: Report, memory: Any, state: TrainState, step: int
  ) -> Collected:
    """What a step collects, made of scored rows: the last three of the five steps."""
    with self.meter.timing('annotation'):
      random = self.random(step)
      batch, memory = self.exchange(batch, memory, random)
      batch = self.annotated(batch, state, step, random)
      self.meter.add('annotation', self.annotate.flops(batch))
      report.metrics.update(self.mismatch(batch))
      memory = self.measured(batch, memory)
      batch, credit_state = self.credit(batch, state)
    report.metrics['staleness'] = float(batch.staleness.mean())
    report.metrics.update(self.meter.take() | self.context.engine.take())
    return Collected(batch, credit_state, memory, *report)

  def fresh(self, state: TrainState, draw: Draw, step: int) -> tuple[Batch, Report]:
    """Rows that are sampled and scored, and what to report of them."""
    # Processes exchange values over the devices that sample, on which this may be the only thread.
    with exchanges.on(self.context.sampler_mesh or self.context.mesh):
      with self.meter.timing('rollout'):
        rows, records = self.sample(state, draw, step)
      with self.meter.timing('scoring'):
        batch, report = self.score(rows, records, state, draw, step)
    return batch.replace(sampled_at=np.full(len(batch.tokens), step, np.int32)), report

  def lent(self, state: TrainState) -> TrainState:
    """The state that the sampler reads: that of training, unless it samples on other devices."""
    return state

  def random(self, step: int) -> np.random.Generator:
    """What decides at random which remembered rows are used; minibatches take (seed, step)."""
    return np.random.default_rng((self.context.seed, step, 1))

  def count(self, rows: Drawn, samples_per_prompt: int) -> Drawn:
    """Counts the operations of the sampler, which prefills a prompt once, and how many tokens a pass has
    given, if it speculates; returns the rows."""
    layout = Layout(self.context.layout.prompt_length, samples_per_prompt)
    self.meter.add('rollout', speed.forward_flops(self.context.policy.config, rows.batch, layout))
    if rows.passes is not None:
      self.meter.passed(int(rows.batch.mask.sum()), int(rows.passes.sum()))
    return rows

  @abc.abstractmethod
  def sample(self, state: TrainState, draw: Draw, step: int) -> tuple[Drawn, Sequence[dict]]:
    """Completions of the records that `draw` gives, and these records."""

  def score(
    self, rows: Drawn, records: Sequence[dict], state: TrainState, draw: Draw, step: int
  ) -> tuple[Batch, Report]:
    """The rows with `rewards` and `valid`, and what to report of them."""
    del state, draw, step
    batch, texts = score_rows(rows, records, self.context)
    return batch, Report.of(batch, texts)

  def annotated(
    self, batch: Batch, state: TrainState, step: int, random: np.random.Generator
  ) -> Batch:
    """The batch with all that is read of its rows: their age (`staleness`), a random number of each, the
    sampler's log-probs as proximal ones, what the curriculum knows, and what models compute."""
    batch = batch.with_arrays(
      staleness=(step - batch.sampled_at).astype(np.float32),
      uniform=random.random(len(batch.tokens), np.float32),
      proximal_logp=batch.behavior_logp,
    )
    return self.annotate(state, self.tracked(batch, state))

  def mismatch(self, batch: Batch) -> dict[str, float]:
    """How far log-probs of the sampler are from those of the trainer, in fresh rows of the policy; {}
    where those of the trainer are not recomputed.

    * `mismatch/kl`: the k3 estimate of KL(sampler || policy) of the tokens, nats.
    * `mismatch/max_gap`: the largest absolute log-ratio, nats.
    """
    rows = batch.staleness == 0
    if batch.stream is not None:
      rows &= batch.stream == STREAMS.index('sampled')
    if 'opponent' in batch:
      rows &= batch['opponent'] == 0
    where = batch.mask & rows[:, None]
    if 'proximal_logp' not in self.annotate.own or not where.any():
      return {}
    log_ratio = (batch.proximal_logp - batch.behavior_logp)[where].astype(np.float64)
    kl = np.mean(np.expm1(np.minimum(log_ratio, FAR)) - log_ratio)
    return {'mismatch/kl': float(kl), 'mismatch/max_gap': float(np.abs(log_ratio).max())}

  def tracked(self, batch: Batch, state: TrainState) -> Batch:
    """The batch with what the curriculum knows of the prompts of its rows."""
    curriculum = self.context.curriculum
    if not curriculum.provides:
      return batch
    found = curriculum.features(to_host(state.curriculum_state), batch.prompt_ids)
    return batch.with_arrays(**{name: found[name] for name in curriculum.provides})

  def exchange(self, batch: Batch, memory: Any, random: np.random.Generator) -> tuple[Batch, Any]:
    """The batch to train on, and the next memory; without a memory it is the batch itself."""
    del random
    return batch, memory

  def measured(self, batch: Batch, memory: Any) -> Any:
    """The next memory, with what it keeps of the annotated batch."""
    del batch
    return memory

  def credit(self, batch: Batch, state: TrainState) -> tuple[Batch, Any]:
    """The batch with advantages, returns or labels, and the next state of the estimator."""
    if self.influences is not None:
      batch = self.influences(state, batch)
      gradients = batch['influences'].shape[1]  # one of each reward
      model, layout = self.context.policy.config, self.context.layout
      self.meter.add('annotation', gradients * speed.update_flops(model, batch, layout))
    batch, credit_state = to_host(self.assign(batch, to_host(state.credit_state)))
    if self.mask_truncated:  # after credit: these rows count in the statistics of their group
      batch = batch.replace(mask=batch.mask & batch.finished[:, None])
    return batch.replace(layout=self.context.layout), credit_state


def sampled_of(batch: Batch, texts: Texts) -> curricula.Sampled:
  """What a curriculum is told of scored rows."""
  return curricula.Sampled(
    rows=np.asarray(batch.prompt_ids, np.int32),
    rewards=np.asarray(batch.rewards, np.float32),
    valid=np.asarray(batch.valid, bool),
    terms={name: np.asarray(x, np.float32) for name, x in texts.scores.components.items()},
    replaced=np.zeros(len(batch.valid), bool),
  )


def common(
  settings: Sampling,
  context: Context,
  *,
  recompute_proximal: bool,
  **annotator: Any,
) -> dict[str, Any]:
  """The fields of `Steps`, from the settings of a collector.

  Args:
    annotator: further arguments of `make_annotator`.
  """
  return dict(
    context=context,
    annotate=make_annotator(
      context, settings.temperature, recompute_proximal=recompute_proximal, **annotator
    ),
    assign=jit(functools.partial(credits.assign, context.credit), small=True),
    influences=make_influences(context, settings.temperature),
    mask_truncated=settings.mask_truncated,
  )
