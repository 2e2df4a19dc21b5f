"""The exact distribution of an experiment's gradient: all rollouts of a tiny policy.

An estimator is a credit and an objective, as an experiment composes them. It gets every group of `G`
samples that the sampling policy can produce (S^G of them), arranged as `collect` arranges them, and
what comes out is its gradient on each, its mean and its variance: no Monte Carlo, no learned
critic, no optimizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import credit as credits
from polgrad.credit import Estimator
from polgrad.objectives import Objective
from polgrad.registry import call
from polgrad.tabular import enumerable
from polgrad.types import Array, Batch, Outputs, Params


class Setting(NamedTuple):
  """One prompt, and the policies around it. Params are logits f32[P, V].

  Attributes:
    policy: the sequences, from `enumerable.table`.
    rewards: [S].
    params: the policy that is trained.
    behavior: the policy that sampled.
    anchors: reference, teacher, ... by name; `proximal` may be among them, otherwise it is `behavior`.
    values: [S, H], what a critic says before every token.
    features: further arrays of the rollout, [G, ...]: one for all groups.
    staleness: policy versions between `behavior` and `params`.
    demonstration: index of a sequence that joins every group, or -1.
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


class Distribution(NamedTuple):
  """A random gradient, f64[P * V]."""

  mean: np.ndarray
  variance: float  # the trace of its covariance


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
  """Mean and variance of the ascent direction -grad loss over all groups of `group` samples.

  An objective that compares pairs gets the group as pairs. Where a method draws random numbers, each
  group has its own. The settings differ in their arrays only, so that one program serves all.

  Args:
    stats: the collector's statistics of the policy when the batch is used.
    credit_state: of a credit with memory; by default its first one.
  """
  first = settings[0]
  samples = np.indices((len(first.rewards),) * rows_per_prompt).reshape(rows_per_prompt, -1).T
  pad = -len(samples) % chunk
  rows = np.concatenate([samples, np.zeros((pad, rows_per_prompt), samples.dtype)])
  state = credit.init() if credit_state is None else credit_state
  numbers = np.arange(len(rows), dtype=np.uint32)

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

  def distribution(setting: Setting) -> Distribution:
    log_p = np.asarray(jnp.sum(enumerable.logp(setting.policy, setting.behavior), axis=1))
    weight = np.concatenate([np.exp(log_p[samples].sum(axis=1)), np.zeros(pad)])
    arrays = {name: getattr(setting, name) for name in ARRAYS}
    mean, square = 0.0, 0.0
    for start in range(0, len(rows), chunk):
      piece = slice(start, start + chunk)
      one, two = moments(arrays, rows[piece], weight[piece], numbers[piece])
      mean, square = mean + np.asarray(one), square + float(two)
    return Distribution(mean=mean, variance=max(square - float(mean @ mean), 0.0))

  return [distribution(setting) for setting in settings]


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
  """The loss at `params` of the group of sequences `sample`, i32[G]."""
  policy, anchors = setting.policy, setting.anchors
  if setting.demonstration >= 0:
    sample = jnp.append(sample, setting.demonstration)
  size = len(sample)
  sampled = jnp.arange(size) < size - (setting.demonstration >= 0)
  behavior = enumerable.logp(policy, setting.behavior)[sample]
  mask = jnp.asarray(policy.mask)[sample]
  rows = {
    'mask': mask,
    'valid': jnp.ones(size, bool),
    'rewards': jnp.asarray(setting.rewards)[sample],
    'group_ids': jnp.arange(size)
    // (objective.rows_per_prompt if objective.rows_per_prompt > 1 else size),
    'behavior_logp': jnp.where(sampled[:, None], behavior, 0.0),
    'proximal_logp': enumerable.logp(policy, anchors.get('proximal', setting.behavior))[sample],
    'old_values': jnp.asarray(setting.values)[sample],
    'staleness': jnp.full(size, setting.staleness),
    'uniform': jax.random.uniform(key, (size,)),
    **{f'{k}_logp': enumerable.logp(policy, v)[sample] for k, v in anchors.items()},
    **_statistics(setting, stats, jax.lax.stop_gradient(params), sample),
    **{k: jnp.asarray(v) for k, v in setting.features.items()},
  }
  if setting.demonstration >= 0:
    rows['stream'] = sampled.astype(jnp.int32)
  fields, _ = credits.assign(credit, rows, credit_state)
  rows |= fields
  own = {k: v for k, v in rows.items() if k in Batch.__dataclass_fields__}
  batch = Batch(
    tokens=jnp.asarray(policy.tokens)[sample],
    segment_ids=mask.astype(jnp.int32),
    features={k: v for k, v in rows.items() if k not in own},
    **own,
  )
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


def _statistics(
  setting: Setting, stats: Mapping[str, Any], params: Params, sample: Array
) -> dict[str, Array]:
  """Statistics of the next-token distributions [G, H]; a free table's hidden state has norm one."""
  policy = setting.policy
  arrays = {
    'logits': policy.logits(params)[policy.prefixes],
    'tokens': jnp.asarray(policy.tokens),
    'hidden': jnp.ones((*policy.tokens.shape, 1)),
  }
  if 'teacher' in setting.anchors:
    teacher = policy.logits(jnp.asarray(setting.anchors['teacher']))
    arrays['teacher_logits'] = jax.lax.stop_gradient(teacher)[policy.prefixes]
  return {name: call(stat, arrays)[sample] for name, stat in stats.items()}
