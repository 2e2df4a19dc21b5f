"""The world of the estimator report: a tiny policy, its history, and what methods say they maximise.

Everything is a function of logits f64[P, 3] and exact. `behavior` are the logits that sampled.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.tabular import enumerable

STALENESS = (0, 1, 4, 16)  # exact gradient steps between the sampling policy and the trained one
POLICY = enumerable.table(3, 3, stop=0)  # 15 sequences of one to three tokens
REWARDS = np.zeros(len(POLICY.tokens))
REWARDS[[2, 5, 9, 13]] = 1.0
DEMONSTRATION = 9  # a right one


@functools.cache
def trajectory(steps: int = max(STALENESS), rate: float = 0.5) -> tuple[np.ndarray, ...]:
  """Logits after 0, 1, ..., `steps` exact gradient steps on E[R]."""
  logits = [0.7 * np.random.default_rng(0).normal(size=(len(np.unique(POLICY.prefixes)), 3))]
  ascent = jax.jit(jax.grad(lambda x: enumerable.objective(POLICY, x, jnp.asarray(REWARDS))))
  for _ in range(steps):
    logits.append(logits[-1] + rate * np.asarray(ascent(logits[-1])))
  return tuple(logits)


def probabilities(logits) -> np.ndarray:
  return np.exp(np.asarray(enumerable.logp(POLICY, logits)).sum(axis=1))


def reference() -> np.ndarray:
  """Another policy near the start, so that regularisers pull somewhere else than back."""
  return trajectory()[0] + 0.3 * np.random.default_rng(1).normal(size=trajectory()[0].shape)


# What methods say they maximise: (number, logits, behavior) -> what to climb. The number is theirs.


def mean_return(number, logits, behavior):
  """E[R]."""
  del number, behavior
  return enumerable.objective(POLICY, logits, jnp.asarray(REWARDS))


def minus_kl(beta, logits, behavior):
  """E[R] - beta KL(pi || reference), of whole sequences."""
  return mean_return(None, logits, behavior) - beta * _kl(logits, reference())


def minus_kl_to_sampler(beta, logits, behavior):
  """E[R] - beta KL(pi || the policy that sampled)."""
  return mean_return(None, logits, behavior) - beta * _kl(logits, behavior)


def win_rate(target, logits, behavior):
  """E[P(beats a sample)] - KL(pi || the policy that sampled) / eta, with eta = 2 target."""
  wins = jax.nn.sigmoid(REWARDS[:, None] - REWARDS[None, :]) @ probabilities(behavior)
  return enumerable.objective(POLICY, logits, wins) - _kl(logits, behavior) / (2 * target)


def plus_entropy(weight, logits, behavior):
  """E[R] + weight times the summed entropy of the tokens that the policy visits."""
  log_p = jax.nn.log_softmax(logits)
  entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)[POLICY.prefixes]
  visited = jnp.sum(jnp.where(POLICY.mask, entropy, 0.0), axis=1)
  return mean_return(None, logits, behavior) + weight * enumerable.objective(
    POLICY, logits, visited
  )


def minus_root_chi_square(weight, logits, behavior):
  """E[R] - weight sqrt(chi2(pi || reference))."""
  p = jnp.exp(jnp.sum(enumerable.logp(POLICY, logits), axis=1))
  chi_square = jnp.sum(p * p / probabilities(reference())) - 1
  return mean_return(None, logits, behavior) - weight * jnp.sqrt(chi_square)


def minus_jensen_shannon(beta, logits, behavior):
  """-D(pi || p), p = reference exp(R / beta) / Z: the sum of KLs to the middle of both."""
  del behavior
  target = probabilities(reference()) * np.exp(REWARDS / beta)
  target = target / target.sum()
  t = jnp.exp(jnp.sum(enumerable.logp(POLICY, logits), axis=1)) / target
  return -jnp.sum(target * (t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2)))


def _kl(logits, other):
  gap = enumerable.logp(POLICY, logits) - enumerable.logp(POLICY, jnp.asarray(other))
  return enumerable.objective(POLICY, logits, jnp.sum(gap, axis=1))


IN_CREDIT, IN_LOSS = 'credit.kl_coefficient', 'objective.penalties.kl.weight'
BONUS = 'objective.penalties.bonus.weight'
# method -> what it states, and where its phase has the number; E[R] for all others
STATED: dict[str, tuple[Callable, str]] = {
  **dict.fromkeys(('rloo', 'demo_regularized', 'reinforce_plus_plus'), (minus_kl, IN_CREDIT)),
  **dict.fromkeys(
    (
      'grpo',
      'aspo',
      'view_r1',
      'reinforce_plus_plus_baseline',
      'deepseek_v32',
      'intellect2',
      'vineppo',
    ),
    (minus_kl, IN_LOSS),
  ),
  **dict.fromkeys(('a_star_po', 'copg', 'dro_v', 'tba', 'tbrm'), (minus_kl, 'objective.beta')),
  'pcl': (minus_kl, 'objective.surrogate.beta'),
  'remix': (minus_kl, 'objective.penalties.base.weight'),
  **dict.fromkeys(
    ('opmd', 'opmd_log_partition', 'opmd_kimi_sequence'), (minus_kl_to_sampler, 'objective.beta')
  ),
  **dict.fromkeys(('mdpo', 'humanline'), (minus_kl_to_sampler, IN_LOSS)),
  **dict.fromkeys(('opmd_kimi', 'dro'), (minus_kl_to_sampler, 'objective.penalties.mirror.weight')),
  'sppo': (win_rate, 'objective.loss.target'),
  **dict.fromkeys(('ppo', 'entropy_bonus', 'impala', 'relift'), (plus_entropy, BONUS)),
  'epo': (plus_entropy, 'objective.penalties.bonus.weight'),
  **dict.fromkeys(
    ('hpt', 'luffy', 'srft'), (plus_entropy, 'objective.streams.sampled.penalties.bonus.weight')
  ),
  'correlated_proxies': (minus_root_chi_square, 'credit.costs.chi.weight'),
  'f_dpg': (minus_jensen_shannon, 'credit.beta'),
}
# method -> why its regulariser is not part of what it states, which is E[R]
NOT_STATED = {
  'asymre': 'the likelihood of all samples shifts the baseline',
  'confucius3': 'the controller begins with the coefficient 0',
  'dypo': 'half of its loss separates pairs, which no reward less a penalty is behind',
  'kl_cov': 'the penalty is a trust region for a few selected tokens',
  'lp_reg': 'the penalty protects a few selected tokens',
}
# Penalties that regularise the critic, not the policy.
OF_VALUES = ('penalties.value_error', 'penalties.clipped_value_error')
# method -> where its phase has the temperature of a critic of soft values
SOFT_VALUES = {'dro_v': 'objective.beta', 'pcl': 'objective.surrogate.beta'}


def stated(name: str, phase: dict) -> Callable:
  """(logits, behavior) -> what the method states that it maximises, with its own number."""
  function, path = STATED.get(name, (mean_return, ''))
  number = number_at(phase, path) if path else None
  return functools.partial(function, number)


def regularisers(phase: dict) -> list[str]:
  """Where a phase has a KL, entropy, chi-square or other term that acts on the policy.

  These are a nonzero `kl_coefficient`, `costs` and `penalties` (but not errors of values) with a
  nonzero weight, the `beta` of a regression, and an anchor `reference`.
  """
  found = ['anchors.reference'] if 'reference' in phase['anchors'] else []
  for path, node in _nodes({k: phase[k] for k in ('credit', 'objective')}):
    if node.get('kl_coefficient'):
      found.append(f'{path}.kl_coefficient')
    if node.get('name') == 'objectives.Regression':
      found.append(f'{path}.beta')
    if path.rpartition('.')[2] in ('penalties', 'costs'):
      found += [
        f'{path}.{k}' for k, v in node.items() if v['weight'] and v['name'] not in OF_VALUES
      ]
  return found


def _nodes(tree: dict, path: str = ''):
  """Every dict in a tree with its dotted path."""
  for key, value in tree.items():
    if isinstance(value, dict):
      own = f'{path}.{key}' if path else key
      yield own, value
      yield from _nodes(value, own)


def number_at(phase: dict, path: str) -> float:
  for key in path.split('.'):
    phase = phase[key]
  return phase


def values_of(name: str, phase: dict, behavior) -> np.ndarray:
  """A critic at rest: E[R | prefix] under the sampling policy, or the soft value of the reference."""
  if name in SOFT_VALUES:
    beta = number_at(phase, SOFT_VALUES[name])
    soft = np.log(_prefix_mean(np.exp(REWARDS / beta), probabilities(reference())))
    scaled = soft if name == 'dro_v' else beta * soft  # DRO-V's head is V / beta
    return np.where(POLICY.mask, scaled, 0.0)
  return np.where(POLICY.mask, _prefix_mean(REWARDS, probabilities(behavior)), 0.0)


def terms(names: Sequence[str]) -> dict[str, np.ndarray]:
  """What noted terms of the reward say of every sequence, and that all of them are finished, [S].

  Sequences of equal length are a stratum, no two have the same answer, and those that begin with token 1
  are in the mode on. All have the structure that is wanted. Other terms are 0.
  """
  sequences = np.arange(len(POLICY.tokens))
  known = {
    'stratum': POLICY.mask.sum(axis=1),
    'answer': sequences,
    'mode': POLICY.tokens[:, 0] == 1,
    **dict.fromkeys(('parsed', 'fields'), np.ones(len(sequences))),
  }
  found = {f'{name}_term': np.asarray(known.get(name, 0 * sequences), float) for name in names}
  return {'finished': np.ones(len(sequences), bool), **found}


def _prefix_mean(x: np.ndarray, p: np.ndarray) -> np.ndarray:
  """E[x | prefix] before every token, f64[S, H]."""
  total, reach = np.zeros(POLICY.prefixes.max() + 1), np.zeros(POLICY.prefixes.max() + 1)
  rows, _ = np.nonzero(POLICY.mask)
  at = POLICY.prefixes[POLICY.mask]
  np.add.at(total, at, (p * x)[rows])
  np.add.at(reach, at, p[rows])
  return (total / reach)[POLICY.prefixes]


def baseline_rewards(role: str, live, rows: int) -> np.ndarray:
  """Rewards [rows, n] of the greedy answer, or of about 1000 samples of the reference, each sequence
  as often as its probability says."""
  if role == 'greedy':
    best = np.asarray(live).argmax(axis=1)
    taken = np.where(POLICY.mask, best[POLICY.prefixes] == POLICY.tokens, True).all(axis=1)
    return np.full((rows, 1), REWARDS[np.flatnonzero(taken)[0]])
  counts = np.round(1000 * probabilities(reference())).astype(int)
  return np.tile(np.repeat(REWARDS, counts), (rows, 1))
