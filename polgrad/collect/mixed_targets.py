"""Mixed demonstrations for two networks that give each other targets: ELR+ (arXiv:2007.00151)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from polgrad import speed
from polgrad.collect.base import (
  Annotator,
  Collect,
  Collected,
  Context,
  Draw,
  laid_out,
  make_annotator,
)
from polgrad.collect.data import Demonstrations
from polgrad.collect.early import EarlyTargets, Targets, followed_rows
from polgrad.compiling import jit
from polgrad.data.tokenizers import Tokenizer
from polgrad.learner import forward_in_pieces, parameter_sets
from polgrad.losses import logit_stats
from polgrad.registry import Positive
from polgrad.sharding import to_host
from polgrad.types import Array, Batch, Params, TrainState

PEER = 'peer'  # the second network, an anchor that learns
# Whose predictions the targets of each network follow: the running mean of the other one.
TEACHERS = {'': 'peer_mean', PEER: 'policy_mean'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedTargets(EarlyTargets):
  """Prompts with their `answer`, mixed in pairs, and running means of what another network predicted.

  Two networks learn: the policy, and the anchor `peer`. Each reads every row i mixed with a random row j
  of the batch: the mean of their embeddings, position by position, with the weight l for i,
  l = max(u, 1 - u), u ~ Beta(mixing, mixing), one number a batch and network. It learns the tokens of
  both, with the weights l and 1 - l; a position is in the mask if it is in that of i or of j. Targets
  are mixed in the same way: t_i and t_j are the running means of the predictions, on rows that are not
  mixed, of the anchor `peer_mean` for the policy, and of `policy_mean` for the peer. The arrays of the
  peer are features `peer/NAME`. Held-out rows are mixed with nothing and have no targets.

  The means are part of the checkpoint: 16 bytes * memory * length * top.
  """

  # Both parameters of the Beta distribution.
  mixing: Positive = 1.0

  @property
  def provides(self) -> frozenset[str]:
    return super().provides | {'partner_tokens', 'own_share', 'mixed_tokens', 'mixed_weights'}

  @property
  def anchors_read(self) -> frozenset[str]:
    return frozenset({PEER, *TEACHERS.values()})

  def lay_out(self, records: Sequence[dict], *, tokenizer: Tokenizer, cut: bool = False) -> Batch:
    batch = super().lay_out(records, tokenizer=tokenizer, cut=cut)
    return mixed(batch, np.arange(len(batch.tokens)), 1.0)

  def init(self) -> dict[str, Targets]:
    return {network or 'policy': super(MixedTargets, self).init() for network in TEACHERS}

  def make(self, context: Context) -> Collect:
    if context.layout.pack:
      raise ValueError('MixedTargets: a row is mixed with another one, so it needs pack=0')
    predict = functools.partial(
      forward_in_pieces,
      context.policy,
      temperature=self.temperature,
      micro_batches=context.micro_batches,
      stats={'predicted': functools.partial(logit_stats.most_likely, k=self.top)},
    )
    annotate = make_annotator(context, self.temperature)
    return _Steps(settings=self, context=context, annotate=annotate, predict=jit(predict)).collect


def mixed(batch: Batch, partner: np.ndarray, share: float) -> Batch:
  """The rows (NumPy) mixed with others: what the model reads, and what it learns.

  Args:
    batch: with `early_tokens` and `early_targets` [B, T * k].
    partner: i[B], the row that each is mixed with.
    share: weight of the row itself.
  """
  rows, width = batch.tokens.shape
  of = lambda name: batch[name].reshape(rows, width, -1)
  both = lambda x, y: np.concatenate([x, y], axis=2).reshape(rows, -1)
  tokens, mask = batch.tokens[:, :, None], batch.mask[:, :, None].astype(np.float32)
  targets = np.where(batch.mask[:, :, None], of('early_targets'), 0).astype(np.float32)
  weigh = lambda x: both(np.float32(share) * x, np.float32(1 - share) * x[partner])
  return batch.replace(
    segment_ids=np.maximum(batch.segment_ids, batch.segment_ids[partner]),
    mask=batch.mask | batch.mask[partner],
  ).with_arrays(
    partner_tokens=batch.tokens[partner],
    own_share=np.full(rows, share, np.float32),
    mixed_tokens=both(tokens, tokens[partner]),
    mixed_weights=weigh(mask),
    early_tokens=both(of('early_tokens'), of('early_tokens')[partner]),
    early_targets=weigh(targets),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
  """Lays rows out, has both networks predict them, moves their means, and mixes them."""

  settings: MixedTargets
  context: Context
  annotate: Annotator
  predict: Callable[[Params, Batch], Array]  # compiled
  meter: speed.Meter = dataclasses.field(default_factory=speed.Meter)

  def collect(self, state: TrainState, draw: Draw, step: int) -> Collected:
    settings, records = self.settings, draw(self.settings.records)
    given = dict(tokenizer=self.context.tokenizer, cut=settings.cut)
    plain = laid_out(functools.partial(Demonstrations.lay_out, settings, **given), records)
    rows = np.array([record['id'] for record in records])
    memory = {name: Targets(*x) for name, x in to_host(state.collect_state).items()}
    with self.meter.timing('annotation'):
      found = self._predicted(state, plain)
      plain = self.annotate(state, plain)
    batch, known = None, 0.0
    for number, network in enumerate(TEACHERS):
      name = network or 'policy'
      followed, memory[name], known = followed_rows(
        settings, plain, found[network], memory[name], rows
      )
      random = np.random.default_rng((self.context.seed, step, 11, number))
      u = random.beta(settings.mixing, settings.mixing)
      own = mixed(followed, random.permutation(len(rows)), max(u, 1 - u))
      batch = own if batch is None else batch.with_arrays(**seen(own, plain, network))
    length = plain.mask.sum() / max(plain.mask.any(axis=1).sum(), 1)
    share = float(batch['own_share'][0])
    return Collected(
      batch=batch.replace(layout=self.context.layout),
      credit_state=to_host(state.credit_state),
      collect_state=memory,
      metrics={
        'length': float(length),
        'rows_seen_before': known,
        'mixing': 1 - share,
        **self.meter.take(),
      },
      samples=[],
      messages=[],
    )

  def _predicted(self, state: TrainState, plain: Batch) -> dict[str, np.ndarray]:
    """The likeliest tokens of the rows under the teacher of each network."""
    placed = self.annotate.placed(plain)
    params = parameter_sets(state, self.context.frozen)
    config, layout = self.context.policy.config, self.context.layout
    self.meter.add('annotation', len(TEACHERS) * speed.forward_flops(config, plain, layout))
    return {
      network: to_host(self.predict(params[anchor], placed).stats['predicted'])
      for network, anchor in TEACHERS.items()
    }


def seen(own: Batch, plain: Batch, network: str) -> Mapping[str, np.ndarray]:
  """The arrays of a network that differ from those of plain rows, as features `NETWORK/NAME`."""
  names = {'segment_ids', 'mask', *own.features.keys() - plain.features.keys()}
  return {f'{network}/{name}': own[name] for name in sorted(names)}
