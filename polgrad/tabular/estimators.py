"""The exact mean and variance of a method's gradient, over all rollouts of a tiny policy.

A method is a credit estimator and an objective, as an experiment composes them. It is applied to every
group of `G` samples that the sampling policy can produce (S^G of them, with S sequences), arranged as
`collect` arranges a batch. The gradient of each group is weighted by the probability of the group. No
Monte Carlo, learned critic or optimizer is involved.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import credit as credits
from polgrad.credit import Estimator
from polgrad.models.token_stats import whole_context
from polgrad.objectives import Objective
from polgrad.registry import call
from polgrad.tabular import enumerable
from polgrad.types import STREAMS, Array, Batch, Outputs, Params


class Setting(NamedTuple):
  """One prompt with its rewards, and the policies involved, each given by its logits f32[P, V].

  Attributes:
    policy: the sequences, from `enumerable.table`.
    rewards: [S], the reward of each sequence.
    params: logits of the policy that is trained.
    behavior: logits of the policy that samples.
    anchors: logits of further policies by name (reference, teacher, ...). `proximal` is `behavior` if
      it is not given.
    values: [S, H], a critic's value of the state before each token.
    features: further arrays of the rollout, [G, ...], the same for all groups; default none.
    staleness: batches collected between sampling by `behavior` and use by `params`, default 0.
    demonstration: index of a sequence that is added to every group; -1 (default): none.
    chance: [S], the probability of what was read between the tokens of each sequence, if that is random.
    arrays: further arrays of sequences, [S, ...], such as the rewards of turns; default none.
  """

  policy: enumerable.Policy
  rewards: np.ndarray
  params: Array
  behavior: Array
  anchors: Mapping[str, Array]
  values: np.ndarray
  features: Mapping[str, np.ndarray] = {}
  staleness: float = 0.0
  demonstration: int = -1
  chance: np.ndarray | None = None
  arrays: Mapping[str, np.ndarray] = {}


class Distribution(NamedTuple):
  """Mean and variance of a random gradient."""

  mean: np.ndarray  # [P * V]
  variance: float  # trace of the covariance matrix


def gradient_distributions(
  settings: Sequence[Setting],
  credit: Estimator,
  objective: Objective,
  *,
  rows_per_prompt: int = 4,
  stats: Mapping[str, Any] = {},
  credit_state: Any = None,
  chunk: int = 4096,
) -> list[Distribution]:
  """Mean and variance of the ascent direction -grad loss over all groups of `rows_per_prompt` samples.

  An objective of pairs gets each group as consecutive pairs. If a method uses random numbers, each
  group gets different ones.

  Args:
    settings: prompts and policies. They may differ only in the arrays named in `ARRAYS`, so that one
      compiled program serves all.
    credit: estimator of advantages, returns or labels.
    objective: the loss.
    rows_per_prompt: G, the number of samples in a group.
    stats: statistics of the policy, by name, that the collector computes when a batch is used.
    credit_state: state of the credit; None (default): its initial state.
    chunk: number of groups that are computed at once.

  Returns:
    One distribution per setting.
  """
  first = settings[0]
  # All groups, padded with groups of weight 0 to a multiple of `chunk`, so that one shape compiles.
  samples = np.indices((len(first.rewards),) * rows_per_prompt).reshape(rows_per_prompt, -1).T
  pad = -len(samples) % chunk
  rows = np.concatenate([samples, np.zeros((pad, rows_per_prompt), samples.dtype)])
  state = credit.init() if credit_state is None else credit_state
  numbers = np.arange(len(rows), dtype=np.uint32)

  # Weighted sums of the gradients and of their squared norms, over one chunk of groups.
  @jax.jit
  def moments(arrays, rows, weight, numbers):
    setting = first._replace(**arrays)

    def one(sample, number):
      loss = lambda params: rollout_loss(
        setting, credit, objective, params, sample, stats, state, jax.random.key(number)
      )
      return -jax.grad(loss)(setting.params).ravel()

    gradients = jax.vmap(one)(rows, numbers)
    return weight @ gradients, weight @ jnp.sum(jnp.square(gradients), axis=1)

  # The exact moments of one setting: a sum of all chunks, weighted by the groups' probabilities.
  def distribution(setting: Setting) -> Distribution:
    log_p = np.asarray(jnp.sum(enumerable.logp(setting.policy, setting.behavior), axis=1))
    if setting.chance is not None:
      log_p = log_p + np.log(setting.chance)
    weight = np.concatenate([np.exp(log_p[samples].sum(axis=1)), np.zeros(pad)])
    arrays = {name: getattr(setting, name) for name in ARRAYS}
    mean, square = 0.0, 0.0
    for start in range(0, len(rows), chunk):
      piece = slice(start, start + chunk)
      one, two = moments(arrays, rows[piece], weight[piece], numbers[piece])
      mean, square = mean + np.asarray(one), square + float(two)
    return Distribution(mean=mean, variance=max(square - float(mean @ mean), 0.0))

  return [distribution(setting) for setting in settings]


def gradients(
  setting: Setting,
  credit: Estimator,
  objective: Objective,
  rows: np.ndarray,
  features: Mapping[str, np.ndarray] = {},
  *,
  stats: Mapping[str, Any] = {},
  chunk: int = 4096,
) -> np.ndarray:
  """The ascent direction -grad loss of each of `n` batches, f64[n, P * V].

  Args:
    setting: prompts and policies; several prompts are those of `enumerable.table(..., prompts=)`.
    credit: estimator of advantages, returns or labels.
    objective: the loss.
    rows: i[n, B], sequences of each batch.
    features: by name [n, B, ...], further arrays of the rows, or other values of those that a batch has
      (`mask`, `group_ids`, `stream`).
    stats: as in `gradient_distributions`.
    chunk: number of batches that are computed at once.
  """

  @jax.jit
  def some(rows, features):
    def one(row, own):
      setting_ = setting._replace(features={**setting.features, **own})
      loss = lambda params: rollout_loss(
        setting_, credit, objective, params, row, stats, credit.init(), jax.random.key(0)
      )
      return -jax.grad(loss)(setting.params).ravel()

    return jax.vmap(one)(rows, features)

  pieces = [slice(i, i + chunk) for i in range(0, len(rows), chunk)]
  part = lambda piece: some(rows[piece], {k: np.asarray(x)[piece] for k, x in features.items()})
  return np.concatenate([np.asarray(part(piece)) for piece in pieces])


ARRAYS = ('rewards', 'params', 'behavior', 'anchors', 'values', 'features', 'staleness')


def rollout_loss(
  setting: Setting,
  credit: Estimator,
  objective: Objective,
  params: Params,
  sample: Array,
  stats: Mapping[str, Any],
  credit_state: Any,
  key: Array,
) -> Array:
  """The loss of one group of sequences, f32[], arranged as `collect` arranges a batch.

  Args:
    setting: the prompt and the policies.
    credit: estimator of advantages, returns or labels.
    objective: the loss; terms that are probes are left out of the sum.
    params: logits of the live policy, at which the loss is taken.
    sample: i32[G], indices of the sequences in the group.
    stats: statistics of the policy, by name, that the collector computes when a batch is used.
    credit_state: state of the credit.
    key: random key of the group.
  """
  policy = setting.policy
  # A demonstration is a further row, which the policy did not sample.
  if setting.demonstration >= 0:
    sample = jnp.append(sample, setting.demonstration)
  batch = _scored(setting, sample, objective.rows_per_prompt)
  # Annotations: what critic, anchors and statistics say of the rows, and a random number a row.
  anchors = {'proximal': setting.behavior} | setting.anchors
  values = jnp.asarray(setting.values)[sample]
  places = jnp.arange(values.shape[1], dtype=jnp.int32)
  batch = batch.with_arrays(
    old_values=values,
    # Each token is a step, whose value is exact, as if it had any number of further completions.
    step_values=values,
    step_ids=jnp.where(batch.mask, places, -1),
    uniform=jax.random.uniform(key, (len(sample),)),
    **{f'{k}_logp': enumerable.logp(policy, v)[sample] for k, v in anchors.items()},
    **_statistics(setting, stats, jax.lax.stop_gradient(params), sample),
    **{k: jnp.asarray(v) for k, v in setting.features.items()},
    **{k: jnp.asarray(v)[sample] for k, v in setting.arrays.items()},
  )
  batch, _ = credits.assign(credit, batch, credit_state)
  log_p = jax.nn.log_softmax(policy.logits(params))
  entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)[policy.prefixes]
  outputs = Outputs(
    logp=enumerable.logp(policy, params)[sample],
    entropy=entropy[sample],
    values=jnp.asarray(setting.values)[sample],
    stats=_statistics(setting, objective.stats, params, sample),
  )
  terms, _ = objective.apply(outputs, batch, objective.init(), step=0)
  return sum(term.value() for name, term in terms.items() if name not in objective.probes)


def _scored(setting: Setting, sample: Array, rows_per_prompt: int) -> Batch:
  """The group as sampled and scored rows; the last one may be the demonstration."""
  policy, size = setting.policy, len(sample)
  shown = setting.demonstration >= 0
  sampled = jnp.arange(size) < size - shown
  mask = jnp.asarray(policy.mask)[sample]
  behavior = enumerable.logp(policy, setting.behavior)[sample]
  streams = jnp.array([STREAMS.index('demonstration'), STREAMS.index('sampled')], jnp.int32)
  return Batch(
    tokens=jnp.asarray(policy.tokens)[sample],
    segment_ids=mask.astype(jnp.int32),
    mask=mask,
    behavior_logp=jnp.where(sampled[:, None], behavior, 0.0),
    # An objective that compares pairs gets pairs as groups.
    group_ids=jnp.arange(size) // (rows_per_prompt if rows_per_prompt > 1 else size),
    stream=streams[sampled.astype(jnp.int32)] if shown else None,
    rewards=jnp.asarray(setting.rewards)[sample],
    valid=jnp.ones(size, bool),
    staleness=jnp.full(size, setting.staleness),
  )


def _statistics(
  setting: Setting, stats: Mapping[str, Any], params: Params, sample: Array
) -> dict[str, Array]:
  """Statistics of the next-token distributions at each token of the group, [G, H], by name.

  A table of logits has no hidden state; `hidden` is 1 at each token, so `hidden_norm` is 1.
  """
  policy = setting.policy
  arrays = {
    'logits': policy.logits(params)[policy.prefixes],
    'tokens': jnp.asarray(policy.tokens),
    'hidden': jnp.ones((*policy.tokens.shape, 1)),
    **whole_context(policy.tokens, np.asarray(policy.mask, np.int32), policy.mask),
  }
  if 'teacher' in setting.anchors:
    teacher = policy.logits(jnp.asarray(setting.anchors['teacher']))
    arrays['teacher_logits'] = jax.lax.stop_gradient(teacher)[policy.prefixes]
  return {name: call(stat, arrays)[sample] for name, stat in stats.items()}
