"""Credit: from a scored rollout to the advantages, returns or labels that an objective reads.

An `Estimator` lifts the pure functions of `losses` to a whole rollout. It runs once a rollout,
before minibatches are cut, so group and batch statistics are always those of the whole rollout.
What it returns is data: no gradient flows through it."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from polgrad.losses import advantages as advantage_functions
from polgrad.losses import f_divergences, log_partition, returns
from polgrad.losses import reward_penalties as cost_functions
from polgrad.losses.advantages import NormalizerPart, group_mean, identity, whiten
from polgrad.losses.baselines import optimal_token_baseline
from polgrad.registry import call, check_weighted, inputs, table
from polgrad.types import Array

Arrays = dict[str, Array]


class Estimator(NamedTuple):
  """Credit assignment with its state.

  Attributes:
    apply: (arrays, state) -> (fields, state). `arrays` holds mask, rewards, valid, group_ids and
      what `requires` names; `fields` are the `Batch` fields or features named by `provides`.
    requires: extra arrays: reference_logp, proximal_logp, behavior_logp, old_values, teacher_logp
      [B, T], stream [B], or features of the collector.
    provides: names of the returned fields.
    init: () -> state, carried in `TrainState` and its checkpoints.
  """

  apply: Callable[[Arrays, Any], tuple[Arrays, Any]]
  requires: frozenset[str] = frozenset()
  provides: frozenset[str] = frozenset({'advantages'})
  init: Callable[[], Any] = lambda: ()


def nothing() -> Estimator:
  """No credit: for objectives that read only the data (supervised, distillation)."""
  return Estimator(apply=lambda x, state: ({}, state), provides=frozenset())


def outcome(
  *,
  advantage: advantage_functions.Part = group_mean,
  normalizer: NormalizerPart = identity,
  kl_coefficient: float = 0.0,
  costs: Mapping[str, cost_functions.Part] = {},
) -> Estimator:
  """One advantage a sequence, given to each of its tokens.

  A = advantage(R - kl_coefficient * sum_t k1_t - sum_k coefficient_k * cost_k), with
  k1 = proximal_logp - reference_logp: a KL penalty in the reward has the gradient of
  KL(policy, reference) (arXiv:2402.14740). `costs` are other functions of sum_t k1_t.
  """
  check_weighted('costs', costs)

  def apply(x, state):
    x = dict(x)
    if kl_coefficient or costs:
      x['log_ratio_sum'] = jnp.sum(_k1(x), axis=1)
      penalty = kl_coefficient * x['log_ratio_sum']
      penalty += sum(one.weight * call(one.fn, x) for one in costs.values())
      x['rewards'] = x['rewards'] - penalty
    tokens = jnp.where(x['mask'], call(advantage, x)[:, None], 0.0)
    return {'advantages': normalizer(tokens, x['mask'])}, state

  return Estimator(
    apply=apply, requires=_kl_requires(kl_coefficient or len(costs)) | _named(advantage)
  )


def reward_to_go(
  *,
  discount: float = 1.0,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """A_t = sum over k >= t of discount^(k - t) (r_k - kl_coefficient * k1_k), normalised.

  With whitening over the batch's tokens this is REINFORCE++ (arXiv:2501.03262). A KL penalty to go
  credits a token with its effect on later ones, which no loss of single tokens does.
  """

  def apply(x, state):
    rewards = _token_rewards(x, kl_coefficient)
    future = returns.reward_to_go(rewards, x['mask'], discount=discount)
    return {'advantages': normalizer(future, x['mask'])}, state

  return Estimator(apply=apply, requires=_kl_requires(kl_coefficient))


def token_baseline(*, discount: float = 1.0) -> Estimator:
  """Returns minus the variance-minimising baseline of each position in the group (arXiv:2602.07078).

  Needs the statistic `score_norm` of the rollout's policy, from the collector's `stats`.
  """

  def apply(x, state):
    future = returns.reward_to_go(_token_rewards(x, 0.0), x['mask'], discount=discount)
    return {'advantages': call(optimal_token_baseline, x | {'token_returns': future})}, state

  return Estimator(apply=apply, requires=frozenset({'score_norm'}))


def generalized(
  *,
  discount: float = 1.0,
  trace: float = 0.95,
  normalizer: NormalizerPart = whiten,
  kl_coefficient: float = 0.0,
) -> Estimator:
  """Generalised advantage estimation (arXiv:1506.02438) against a learned value.

  The reward stands on the last policy token, the KL penalty on every token. Returns are taken
  before the advantages are normalised.
  """

  def apply(x, state):
    rewards, values = _token_rewards(x, kl_coefficient), x['old_values']
    advantages = returns.gae(rewards, values, x['mask'], discount=discount, trace=trace)
    return _critic_fields(advantages, advantages + values, normalizer, x['mask']), state

  return _critic(apply, _kl_requires(kl_coefficient))


def vtrace(
  *,
  discount: float = 1.0,
  trace: float = 1.0,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
  rho_pg: float = 1.0,
  normalizer: NormalizerPart = identity,
) -> Estimator:
  """V-trace of IMPALA (arXiv:1802.01561): value targets and advantages for rollouts of an older policy.

  rho = proximal / behavior, cut at `rho_bar` in the error, at `c_bar` in the trace and at `rho_pg` in
  the advantage.
  """

  def apply(x, state):
    knobs = dict(discount=discount, trace=trace, rho_bar=rho_bar, c_bar=c_bar)
    arrays = (_token_rewards(x, 0.0), x['old_values'], _log_rho(x), x['mask'])
    advantages = returns.vtrace_advantages(*arrays, rho_pg=rho_pg, **knobs)
    targets = returns.vtrace_targets(*arrays, **knobs)
    return _critic_fields(advantages, targets, normalizer, x['mask']), state

  return _critic(apply, frozenset({'proximal_logp', 'behavior_logp'}))


def retrace(
  *, discount: float = 1.0, trace: float = 0.95, normalizer: NormalizerPart = whiten
) -> Estimator:
  """Retrace (arXiv:1606.02647) with a critic of states: A_t = target_t - V_t.

  The paper's critic is Q(s, a); ours is V(s), which stands for it (see `returns.retrace_targets`).
  """

  def apply(x, state):
    targets = returns.retrace_targets(
      _token_rewards(x, 0.0),
      x['old_values'],
      _log_rho(x),
      x['mask'],
      discount=discount,
      trace=trace,
    )
    return _critic_fields(targets - x['old_values'], targets, normalizer, x['mask']), state

  return _critic(apply, frozenset({'proximal_logp', 'behavior_logp'}))


def _critic(apply: Callable, requires: frozenset[str]) -> Estimator:
  return Estimator(
    apply=apply,
    requires=requires | {'old_values'},
    provides=frozenset({'advantages', 'returns'}),
  )


def _critic_fields(advantages: Array, targets: Array, normalizer: Callable, mask: Array) -> Arrays:
  targets = jnp.where(mask, targets, 0.0)
  return {'advantages': normalizer(advantages, mask), 'returns': targets}


def moving_baseline(*, decay: float = 0.9) -> Estimator:
  """A = R - b with b a moving average of the mean rewards of earlier rollouts.

  b does not depend on the rollout that it is taken from, so the estimate of the policy gradient is
  exactly unbiased (Williams 1992). State: the average and its weight (for the first rollouts,
  sum_k decay^k r / sum_k decay^k).
  """

  def apply(x, state):
    baseline = state['total'] / jnp.maximum(state['weight'], 1e-8)
    per_row = jnp.where(x['valid'], x['rewards'] - baseline, 0.0)
    rows = jnp.sum(x['valid'])
    mean = jnp.sum(jnp.where(x['valid'], x['rewards'], 0.0)) / jnp.maximum(rows, 1)
    seen = (rows > 0).astype(jnp.float32)
    state = {
      'total': jnp.where(seen, decay * state['total'] + mean, state['total']),
      'weight': jnp.where(seen, decay * state['weight'] + 1.0, state['weight']),
    }
    return {'advantages': jnp.where(x['mask'], per_row[:, None], 0.0)}, state

  return Estimator(apply=apply, init=lambda: {'total': jnp.zeros(()), 'weight': jnp.zeros(())})


def teacher_log_ratio(*, clip: float = 10.0) -> Estimator:
  """A_t = clip(teacher_logp - proximal_logp, -clip, clip): sampled reverse-KL distillation.

  Its expectation on the student's samples is minus the gradient of the token-level reverse KL
  (arXiv:2306.13649). Rewards are not read.
  """

  def apply(x, state):
    gap = jnp.where(x['mask'], x['teacher_logp'] - x['proximal_logp'], 0.0)
    return {'advantages': jnp.clip(gap, -clip, clip)}, state

  return Estimator(apply=apply, requires=frozenset({'teacher_logp', 'proximal_logp'}))


def preference() -> Estimator:
  """Labels for groups of two: 1 where the row's reward is the larger of its pair (arXiv:2402.04792).

  A tie, or a pair with a failed verifier, is masked out of loss and count.
  """

  def apply(x, state):
    rewards = x['rewards'].reshape(-1, 2)
    usable = x['valid'].reshape(-1, 2).all(axis=1) & (rewards[:, 0] != rewards[:, 1])
    better = rewards > rewards[:, ::-1]
    mask = x['mask'] & jnp.repeat(usable, 2)[:, None]
    return {'label': better.astype(jnp.float32).reshape(-1), 'mask': mask}, state

  return Estimator(apply=apply, provides=frozenset({'label', 'mask'}))


def success_contrast(
  *, standardized: bool = False, negative_weight: float = 1.0, least: float = 0.02
) -> Estimator:
  """A = c for right rows and -c negative_weight for wrong ones, and the group's success rate q.

  c = 1 - q, or sqrt((1 - q) / q) if `standardized`; rewards are 0 or 1. For `negative_aware`
  surrogates (arXiv:2505.18116): on-policy the two choices are the weights of Dr. GRPO and of GRPO
  with population std. q is kept in [least, 1 - least]; groups without contrast get 0.
  """

  def apply(x, state):
    rate = x['rewards'] - group_mean(x['rewards'], x['group_ids'], x['valid'])
    mixed = x['valid'] & (rate > 0) & (rate < 1)
    rate = jnp.clip(rate, least, 1 - least)
    scale = jnp.sqrt((1 - rate) / rate) if standardized else 1 - rate
    per_row = scale * jnp.where(x['rewards'] > 0.5, 1.0, -negative_weight)
    per_row = jnp.where(mixed, per_row, 0.0)
    advantages = jnp.where(x['mask'], per_row[:, None], 0.0)
    return {'advantages': advantages, 'success_rate': rate}, state

  return Estimator(apply=apply, provides=frozenset({'advantages', 'success_rate'}))


def win_rate() -> Estimator:
  """Labels in [0, 1]: the chance to beat another row of the group, by the sigmoid of the rewards' gap.

  label_i = mean over j != i of sigmoid(R_i - R_j): SPPO's estimate (arXiv:2405.00675). A row alone
  in its group gets one half.
  """

  def apply(x, state):
    group, valid, rewards = x['group_ids'], x['valid'], x['rewards']
    others = (group[:, None] == group[None, :]) & valid[None, :] & ~jnp.eye(len(group), dtype=bool)
    wins = jnp.where(others, jax.nn.sigmoid(rewards[:, None] - rewards[None, :]), 0.0)
    count = jnp.sum(others, axis=1)
    label = jnp.where(count > 0, jnp.sum(wins, axis=1) / jnp.maximum(count, 1), 0.5)
    return {'label': label}, state

  return Estimator(apply=apply, provides=frozenset({'label'}))


def divergence_reward(
  *, derivative: f_divergences.Part, beta: float = 1.0, decay: float = 0.9
) -> Estimator:
  """A = -f'(pi / p) - b: descends D_f(pi || p), p = reference exp(R / beta) / Z (arXiv:2302.08215).

  Z is the mean of p's numerator over the sampling probability in the group; b is a moving average of
  earlier pseudo-rewards (the paper averages the last 1024). State: that average and its weight.
  """

  def apply(x, state):
    target = jnp.sum(x['reference_logp'], axis=1) + x['rewards'] / beta
    sampled = jnp.sum(x['behavior_logp'], axis=1)
    log_z = log_partition.log_partition(target - sampled, _valid_groups(x))
    log_t = jnp.sum(x['proximal_logp'], axis=1) - target + log_z
    pseudo = jnp.where(x['valid'], -derivative(log_t), 0.0)
    return baseline.apply(x | {'rewards': pseudo}, state)

  baseline = moving_baseline(decay=decay)
  requires = frozenset({'reference_logp', 'proximal_logp', 'behavior_logp'})
  return Estimator(apply=apply, requires=requires, init=baseline.init)


def _valid_groups(x: Arrays) -> Array:
  """Group ids in which a row that is not valid stands alone."""
  return jnp.where(x['valid'], x['group_ids'], -1 - jnp.arange(len(x['valid'])))


def _k1(x: Arrays) -> Array:
  return jnp.where(x['mask'], x['proximal_logp'] - x['reference_logp'], 0.0)


def _token_rewards(x: Arrays, kl_coefficient: float) -> Array:
  rewards = returns.place_last(x['rewards'], x['mask'])
  return rewards - kl_coefficient * _k1(x) if kl_coefficient else rewards


def _log_rho(x: Arrays) -> Array:
  return x['proximal_logp'] - x['behavior_logp']


def _kl_requires(kl_coefficient: float) -> frozenset[str]:
  return frozenset({'proximal_logp', 'reference_logp'} if kl_coefficient else ())


def _named(fn: Callable) -> frozenset[str]:
  """What a function reads beyond what every scored rollout has."""
  return frozenset(inputs(fn)) - {'mask', 'rewards', 'valid', 'group_ids'}


SIMPLE = table(
  'credit',
  nothing,
  outcome,
  reward_to_go,
  token_baseline,
  generalized,
  vtrace,
  retrace,
  moving_baseline,
  teacher_log_ratio,
  preference,
  success_contrast,
  win_rate,
  divergence_reward,
)


def gated(
  *, credit: Annotated[Estimator, SIMPLE], limit: int = 0, threshold: float = 1.0
) -> Estimator:
  """Prompts that the policy cannot solve learn from their demonstration, the others from samples.

  A group with at most `limit` samples of reward >= `threshold` keeps only its demonstration, any
  other only its samples: HPT (arXiv:2509.04419). `credit` sees samples only. limit = -1 is pure
  reinforcement, limit = G pure imitation.
  """

  def apply(x, state):
    sampled = x['stream'] == 1
    solved = sampled & x['valid'] & (x['rewards'] >= threshold)
    same = x['group_ids'][:, None] == x['group_ids'][None, :]
    imitate = jnp.sum(same & solved[None, :], axis=1) <= limit
    fields, state = credit.apply(x | {'valid': x['valid'] & sampled}, state)
    mask = fields.pop('mask', x['mask']) & (sampled != imitate)[:, None]
    return {**fields, 'mask': mask}, state

  return Estimator(
    apply=apply,
    requires=credit.requires | {'stream'},
    provides=credit.provides | {'mask'},
    init=credit.init,
  )


TABLE = SIMPLE | table('credit', gated)
Part = Annotated[Estimator, TABLE]


def assign(estimator: Estimator, arrays: Arrays, state: Any) -> tuple[Arrays, Any]:
  """Runs an estimator; rows without a valid reward leave the loss through the mask.

  `arrays` may hold more than the estimator reads. Masked entries become zero here.
  """
  mask = arrays['mask'] & arrays['valid'][:, None]
  door = lambda x: jnp.where(mask, x, 0) if x.shape == mask.shape and x is not mask else x
  arrays = {name: door(jnp.asarray(x)) for name, x in arrays.items()} | {'mask': mask}
  fields, state = estimator.apply(arrays, state)
  return jax.lax.stop_gradient({'mask': mask, **fields}), state
