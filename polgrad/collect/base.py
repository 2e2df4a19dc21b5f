"""What a collector is, and the parts that all of them share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polgrad import credit as credits
from polgrad import sharding
from polgrad.compiling import jit
from polgrad.data.tokenizers import Tokenizer
from polgrad.learner import forward_in_pieces, parameter_sets
from polgrad.models.policy import Policy
from polgrad.objectives import Objective
from polgrad.packing import pack
from polgrad.rewards.scoring import Scores
from polgrad.sharding import to_host
from polgrad.types import PLAIN, Array, Batch, Layout, TrainState

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
  layout: Layout = PLAIN


class Collected(NamedTuple):
  """One step's data and what to report of it."""

  batch: Batch  # NumPy
  credit_state: Any
  collect_state: Any
  metrics: dict[str, float]
  samples: list[tuple[str, str, float]]  # prompt, completion, reward
  messages: list[str]  # what verifiers complained of


class Collector(NamedTuple):
  """How a phase gets its batches.

  Attributes:
    make: context -> (state, draw, step) -> Collected, where draw(n) gives the next n records.
    records: data records a step.
    rows: rows of the batch that they become.
    rows_per_prompt: rows of one record; they stay together.
    length: positions of a row.
    prompt_length: how many of them hold nothing but the prompt in every row.
    temperature: of sampling, and therefore of all log-probs.
    provides: the `Batch` fields and features that are there without credit or anchors.
    roles: anchors that the sampler reads besides the policy.
    filtered: sampling leaves tokens out (top-k, top-p, greedy, mixtures), so the policy's own
      log-probs are not those of the sampler.
    init: () -> state, carried in `TrainState` and its checkpoints.
  """

  make: Callable
  records: int
  rows: int
  rows_per_prompt: int
  length: int
  temperature: float
  provides: frozenset[str]
  roles: frozenset[str] = frozenset()
  filtered: bool = False
  prompt_length: int = 0
  init: Callable[[], Any] = lambda: ()


def make_annotations(
  context: Context,
  temperature: float,
  *,
  recompute_proximal: bool = False,
  stats: Mapping[str, Callable] = {},
) -> Callable:
  """(state, tokens, segment_ids, mask) -> what the live parameters say of the rows, by name.

  These are the `stats`, and what objective or credit read out of: `old_values`, `proximal_logp` if
  it is recomputed, and `<anchor>_logp` for any anchor.
  """
  wanted = context.objective.requires | context.credit.requires
  common = dict(temperature=temperature, micro_batches=context.micro_batches)
  make = lambda policy, **outputs: jit(
    functools.partial(forward_in_pieces, policy, **common, **outputs)
  )
  own = wanted & {'old_values'} | (wanted & {'proximal_logp'} if recompute_proximal else set())
  of_policy = make(
    context.policy, fields=frozenset({'values'} if 'old_values' in own else ()), stats=stats
  )
  given = {'behavior_logp', 'proximal_logp', *stats, *context.objective.stats}
  anchors = [n.removesuffix('_logp') for n in sorted(wanted - given) if n.endswith('_logp')]
  of_anchor = {n: make(context.frozen.get(n, context.policy), fields=frozenset()) for n in anchors}

  def annotate(
    state: TrainState, tokens: Array, segment_ids: Array, mask: Array
  ) -> dict[str, np.ndarray]:
    rows = Batch(tokens=tokens, segment_ids=segment_ids, mask=mask, layout=context.layout)
    rows = pack(
      rows,
      parts=context.micro_batches,
      data_parallel_size=sharding.data_parallel_size(context.mesh),
    )
    rows = sharding.place_batch(context.mesh, rows)
    found = {}
    if own or stats:
      outputs = of_policy(state.params, rows)
      named = {'proximal_logp': outputs.logp, 'old_values': outputs.values}
      found |= {name: named[name] for name in own} | outputs.stats
    params = parameter_sets(state, context.frozen)
    for name, function in of_anchor.items():
      found[f'{name}_logp'] = function(params[name], rows).logp
    return to_host(found)

  return annotate


def minibatches(
  batch: Batch, *, epochs: int, parts: int, rows_per_prompt: int, seed: Sequence[int]
) -> list[Batch]:
  """`epochs` passes over the batch, each cut at random into `parts`; groups stay whole.

  With one part the rows keep their order.
  """
  groups = np.arange(len(batch.tokens)).reshape(-1, rows_per_prompt)
  random = np.random.default_rng(seed)
  cuts = []
  for _ in range(epochs):
    order = random.permutation(len(groups)) if parts > 1 else np.arange(len(groups))
    cuts += [groups[np.sort(piece)].reshape(-1) for piece in np.split(order, parts)]
  return [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in cuts]
