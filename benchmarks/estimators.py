"""The estimator report: bias and noise of every policy-gradient experiment, exactly.

    python -m benchmarks.estimators            # writes docs/estimators.md, .json and .png

For each experiment, its own credit and objective get every group of four samples that a tiny policy
can produce, and the mean and covariance of the resulting gradient are compared with the gradient
of what the method says it maximises. See docs/estimators.md for how to read it.
"""

import functools
import importlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use('Agg')

import numpy as np

from polgrad import credit as credits
from polgrad import objectives
from polgrad.losses import distributions
from polgrad.registry import bind
from polgrad.tabular import policy as tabular
from polgrad.tabular.estimators import Setting, gradient_distribution

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
STALENESS = (0, 1, 4, 16)  # exact gradient steps between the sampling policy and the trained one
GROUP = 4

POLICY = tabular.table(3, 3, stop=0)  # 15 sequences of one to three tokens
REWARDS = np.zeros(len(POLICY.tokens))
REWARDS[[2, 5, 9, 13]] = 1.0
DEMONSTRATION = 9


class Experiment(NamedTuple):
  """What of a configuration makes the gradient."""

  name: str
  collect: dict
  credit: credits.Estimator
  objective: objectives.Objective
  spec: dict  # of the phase


def load(name: str) -> Experiment:
  config = importlib.import_module(f'experiments.policy_gradient.{name}').get_config('smoke')
  phase = config.phases[config.order[-1]]
  return Experiment(
    name,
    phase.collect.to_dict(),
    bind(phase.credit, credits.TABLE),
    bind(phase.objective, objectives.TABLE),
    phase.to_dict(),
  )


# Policies: exact gradient ascent from a random start, so staleness is what training makes of it.


@functools.cache
def trajectory(steps: int = max(STALENESS), rate: float = 0.5) -> tuple[np.ndarray, ...]:
  """Logits after 0, 1, ..., `steps` exact gradient steps on E[R]."""
  logits = [0.7 * np.random.default_rng(0).normal(size=(len(np.unique(POLICY.prefixes)), 3))]
  ascent = jax.jit(jax.grad(lambda x: tabular.objective(POLICY, x, jnp.asarray(REWARDS))))
  for _ in range(steps):
    logits.append(logits[-1] + rate * np.asarray(ascent(logits[-1])))
  return tuple(logits)


def probabilities(logits) -> np.ndarray:
  return np.exp(np.asarray(tabular.logp(POLICY, logits)).sum(axis=1))


def reference() -> np.ndarray:
  """Another policy near the start, so that regularisers pull somewhere else than back."""
  return trajectory()[0] + 0.3 * np.random.default_rng(1).normal(size=trajectory()[0].shape)


# What methods say they maximise.


def mean_return(logits, behavior):
  del behavior
  return tabular.objective(POLICY, logits, jnp.asarray(REWARDS))


def minus_kl(beta: float, anchor: str = 'reference') -> Callable:
  """E[R] - beta KL(pi || anchor), of whole sequences."""

  def stated(logits, behavior):
    other = {'reference': reference(), 'behavior': behavior}[anchor]
    gap = tabular.logp(POLICY, logits) - tabular.logp(POLICY, jnp.asarray(other))
    kl = tabular.objective(POLICY, logits, jnp.sum(gap, axis=1))
    return mean_return(logits, behavior) - beta * kl

  return stated


def minus_entropy(weight: float) -> Callable:
  """E[R] + weight * mean entropy of the tokens that the policy visits."""

  def stated(logits, behavior):
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)[POLICY.prefixes]
    visited = jnp.sum(jnp.where(POLICY.mask, entropy, 0.0), axis=1)
    return mean_return(logits, behavior) + weight * tabular.objective(POLICY, logits, visited)

  return stated


def minus_root_chi_square(weight: float) -> Callable:
  """E[R] - weight sqrt(chi2(pi || reference))."""

  def stated(logits, behavior):
    other = jnp.asarray(probabilities(reference()))
    p = jnp.exp(jnp.sum(tabular.logp(POLICY, logits), axis=1))
    chi_square = jnp.sum(p * p / other) - 1
    return mean_return(logits, behavior) - weight * jnp.sqrt(chi_square)

  return stated


STATED = {
  # E[R] - beta KL to the reference, however it enters
  **dict.fromkeys(('rloo',), minus_kl(0.03)),
  **dict.fromkeys(('grpo',), minus_kl(0.04)),
  **dict.fromkeys(('reinforce_plus_plus', 'reinforce_plus_plus_baseline'), minus_kl(0.01)),
  **dict.fromkeys(('deepseek_v32', 'intellect2'), minus_kl(0.001)),
  'demo_regularized': minus_kl(0.1),
  'humanline': minus_kl(0.01),
  'a_star_po': minus_kl(1e-3),
  'copg': minus_kl(0.06),
  'dro_v': minus_kl(0.2),
  'pcl': minus_kl(0.1),
  'sppo': minus_kl(1e-3),
  'tba': minus_kl(0.1),
  'tbrm': minus_kl(0.2),
  # E[R] - beta KL to the policy that sampled
  **dict.fromkeys(('opmd', 'opmd_log_partition', 'mdpo'), minus_kl(1.0, 'behavior')),
  **dict.fromkeys(('opmd_kimi', 'dro'), minus_kl(0.1, 'behavior')),
  'opmd_kimi_sequence': minus_kl(0.1, 'behavior'),
  # others
  **dict.fromkeys(('ppo', 'entropy_bonus', 'impala', 'epo', 'hpt'), minus_entropy(0.001)),
  'correlated_proxies': minus_root_chi_square(0.03),
}
# Not estimators from rollouts of one policy, or the same as another.
LEFT_OUT = {
  'hub_grpo': 'the objective of dapo on a real model',
  'otr': 'learns from demonstrations',
  'props': 'changes who samples; its estimator is that of a plain PPO',
}
# Optimizers are no part of an estimator; these read only their objective here.
SOFT_VALUES = {'dro_v': 0.2, 'pcl': 0.1}  # critics of soft values, with their temperature


def values_of(name: str, behavior) -> np.ndarray:
  """A critic at rest: E[R | prefix] under the sampling policy, or the soft value of the reference."""
  if name in SOFT_VALUES:
    beta = SOFT_VALUES[name]
    soft = _prefix_mean(np.exp(REWARDS / beta), probabilities(reference()))
    scaled = np.log(soft) * (1 if name == 'dro_v' else beta)  # DRO-V's head is V / beta
    return np.where(POLICY.mask, scaled, 0.0)
  return np.where(POLICY.mask, _prefix_mean(REWARDS, probabilities(behavior)), 0.0)


def _prefix_mean(x: np.ndarray, p: np.ndarray) -> np.ndarray:
  """E[x | prefix] before every token, f64[S, H]."""
  total, reach = np.zeros(POLICY.prefixes.max() + 1), np.zeros(POLICY.prefixes.max() + 1)
  rows, _ = np.nonzero(POLICY.mask)
  at = POLICY.prefixes[POLICY.mask]
  np.add.at(total, at, (p * x)[rows])
  np.add.at(reach, at, p[rows])
  return (total / reach)[POLICY.prefixes]


def setting_of(one: Experiment, staleness: int) -> Setting:
  """What the experiment's rollout would hold at this staleness."""
  live = trajectory()[-1]
  behavior = trajectory()[len(trajectory()) - 1 - staleness]
  collect = one.collect
  anchors = {'reference': reference(), 'teacher': behavior, 'previous': behavior}
  if one.name == 'humanline':  # its reference follows the policy
    anchors['reference'] = behavior
  if collect.get('recompute_proximal'):
    anchors['proximal'] = live
  features = {}
  rows = GROUP + collect.get('demonstrations', 0)
  if collect.get('baseline_samples'):
    features['baseline_rewards'] = _baseline_rewards(collect['baseline_role']['name'], live, rows)
  rewards = REWARDS
  if one.spec['reward'].get('offset'):  # rewards of 1 and -1
    rewards = 2 * REWARDS - 1
  return Setting(
    policy=POLICY,
    rewards=rewards,
    params=jnp.asarray(live),
    behavior=jnp.asarray(behavior),
    anchors={k: jnp.asarray(v) for k, v in anchors.items()},
    values=values_of(one.name, behavior),
    features=features,
    staleness=staleness,
    demonstration=DEMONSTRATION if collect.get('demonstrations') else -1,
  )


def _baseline_rewards(role: str, live, rows: int) -> np.ndarray:
  """Rewards of the greedy answer, or of so many samples of the reference that counts are shares."""
  if role == 'greedy':
    p = probabilities(live)
    log_p = np.asarray(jax.nn.log_softmax(live))
    best = log_p.argmax(axis=1)
    steps = best[POLICY.prefixes] == POLICY.tokens
    index = np.flatnonzero(np.where(POLICY.mask, steps, True).all(axis=1))
    assert len(index) == 1, p
    return np.full((rows, 1), REWARDS[index[0]])
  counts = np.round(1000 * probabilities(reference())).astype(int)
  return np.tile(np.repeat(REWARDS, counts), (rows, 1))


def credit_state_of(one: Experiment):
  """Moving baselines at rest: the mean reward so far."""
  if one.spec['credit']['name'] != 'moving_baseline':
    return None
  mean = float(probabilities(trajectory()[-1]) @ REWARDS)
  return {'total': jnp.asarray(mean), 'weight': jnp.asarray(1.0)}


class Point(NamedTuple):
  """One estimator at one staleness."""

  angle: float  # degrees between the expected gradient and the stated one
  strength: float  # length of the expected gradient over that of the stated one
  noise: float  # standard deviation over the length of the expected gradient
  progress: float  # E[g] . direction / sqrt(E |g|^2): ascent a step of unit size buys, at most 1


def measure(one: Experiment, staleness: int) -> Point:
  setting = setting_of(one, staleness)
  stats = {
    name: bind(spec, distributions.TABLE) for name, spec in one.collect.get('stats', {}).items()
  }
  found = gradient_distribution(
    setting, one.credit, one.objective, group=GROUP, stats=stats, credit_state=credit_state_of(one)
  )
  stated = STATED.get(one.name, mean_return)
  true = np.asarray(jax.grad(lambda x: stated(x, setting.behavior))(setting.params)).ravel()
  length, along = np.linalg.norm(found.mean), found.mean @ true / np.linalg.norm(true)
  size = np.sqrt(found.variance + length**2)
  return Point(
    angle=float(np.degrees(np.arccos(np.clip(along / max(length, 1e-300), -1, 1)))),
    strength=float(length / np.linalg.norm(true)),
    noise=float(np.sqrt(found.variance) / max(length, 1e-300)),
    progress=float(along / size) if size > 0 else 0.0,
  )


def report(names: list[str]) -> dict[str, dict[str, Point]]:
  rows = {}
  for name in names:
    one = load(name)
    rows[name] = {str(s): measure(one, s) for s in STALENESS}
    told = ' '.join(
      f'{s}: {p.angle:6.2f} {p.noise:5.2f} {p.progress:6.3f}' for s, p in rows[name].items()
    )
    print(f'{name:30s} {told}', flush=True)
  return rows
