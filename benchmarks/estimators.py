"""The estimator report: bias and noise of every policy-gradient experiment, exactly.

    python -m benchmarks.estimators            # writes docs/estimators.md, .json and .png

For each experiment, its own credit and objective get every group of four samples that a tiny policy
can produce, and the mean and covariance of the resulting gradient are compared with the gradient
of what the method says it maximises. See docs/estimators.md for how to read it.
"""

import argparse
import collections
import functools
import importlib
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from polgrad import credit as credits
from polgrad import objectives
from polgrad.losses import distributions
from polgrad.registry import bind
from polgrad.tabular import policy as tabular
from polgrad.tabular.estimators import Distribution, Setting, gradient_distributions

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


def minus_jensen_shannon(beta: float) -> Callable:
  """-D(pi || p), p = reference exp(R / beta) / Z: half the sum of KLs to the middle of both."""

  def stated(logits, behavior):
    del behavior
    target = probabilities(reference()) * np.exp(REWARDS / beta)
    target = target / target.sum()
    t = jnp.exp(jnp.sum(tabular.logp(POLICY, logits), axis=1)) / target
    return -jnp.sum(target * 0.5 * (t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2)))

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
  'f_dpg': minus_jensen_shannon(0.3),
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
    staleness=float(staleness),
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


def measure(one: Experiment) -> dict[str, Point]:
  """The estimator at every staleness."""
  settings = [setting_of(one, s) for s in STALENESS]
  stats = {
    name: bind(spec, distributions.TABLE) for name, spec in one.collect.get('stats', {}).items()
  }
  found = gradient_distributions(
    settings, one.credit, one.objective, group=GROUP, stats=stats, credit_state=credit_state_of(one)
  )
  stated = STATED.get(one.name, mean_return)
  return {
    str(s): compare(got, jax.grad(lambda x, b=setting.behavior: stated(x, b))(setting.params))
    for s, setting, got in zip(STALENESS, settings, found)
  }


def compare(found: Distribution, stated) -> Point:
  true = np.asarray(stated).ravel()
  length, along = np.linalg.norm(found.mean), found.mean @ true / np.linalg.norm(true)
  size = np.sqrt(found.variance + length**2)
  return Point(
    angle=float(np.degrees(np.arccos(np.clip(along / max(length, 1e-300), -1, 1)))),
    strength=float(length / np.linalg.norm(true)),
    noise=float(np.sqrt(found.variance) / max(length, 1e-300)),
    progress=float(along / size) if size > 0 else 0.0,
  )


def unbiased(points: dict[str, Point], staleness: int) -> bool:
  """Whether the expected gradient has exactly the stated direction (a common factor is allowed)."""
  return points[str(staleness)].angle < 1e-4


CLASSES = {
  'exact on-policy and stale': lambda p: unbiased(p, 0) and unbiased(p, max(STALENESS)),
  'exact on-policy': lambda p: unbiased(p, 0),
  'nearly exact on-policy (under 5 degrees)': lambda p: p['0'].angle < 5,
  'biased by design': lambda p: True,
}


def grouped(rows: dict[str, dict[str, Point]]) -> dict[str, list[str]]:
  """Names by the first class they belong to, the best progress on-policy first."""
  found = {title: [] for title in CLASSES}
  for name in sorted(rows, key=lambda n: -rows[n]['0'].progress):
    title = next(t for t, belongs in CLASSES.items() if belongs(rows[name]))
    found[title].append(name)
  return found


PAGE = """# What the estimators do: exact bias and noise of every policy-gradient experiment

Made by `python -m benchmarks.estimators`; nothing here is sampled.

The policy is a free table over {sequences} sequences of one to three tokens (three tokens, one of them
the stop token), the reward is 0 or 1, and {group} samples are drawn. Credit and objective of each
experiment get all {groups} groups with their probabilities, so that the mean and the covariance of the
gradient are exact. The policy comes from {steps} exact gradient steps (mean reward {before:.2f} to
{after:.2f}); at staleness s the samples are those of the policy s steps earlier (KL to the present
policy {kls}).

* **angle**: degrees between the expected gradient and that of the objective that the method states
  (E[R], with its KL, entropy or chi-square term where it has one). 0 is unbiased up to a factor, 90
  is useless, beyond 90 climbs down.
* **noise**: standard deviation of the gradient over the length of its mean. Averaging n batches
  divides it by sqrt(n); it does nothing to the angle.
* **progress**: E[g] . u / sqrt(E|g|^2) with u the true direction: the share of a step's length that
  climbs. It weighs bias against noise at this sample budget; 1 would be the exact gradient.

![progress by method and staleness](estimators.png)

## What to read from it

{reading}

Three things explain most of it.

* **What is divided by sampled lengths is biased**: a mean over each sequence's tokens (`grpo`, `gspo`,
  `gmpo`, `sapo`) most, a mean over all tokens of the batch (`dapo`, `tis`, ...) a little, a constant
  or a sum not at all.
* **A ratio corrects staleness and pays in noise; a clip does not correct it.** PPO's one-sided clip
  silences tokens that have already moved the way of their advantage. After enough steps in the
  right direction those are the tokens that carry the signal, and the mean of the rest can point
  backwards: a clip says "stop", it is no estimate for stale data. Sequence bounds as narrow as
  GSPO's say so after one step. Corrections that keep the token (`tis`, `cispo`, `icepop`,
  `decoupled_ppo`, `a3po`) or weigh the sequence (`mis`, `harpg`, `topr`) stay close.
* **Regressions** (`opmd`, `copg`, `tba`, `dro_v`, `a_star_po`) **are unbiased on-policy.** On stale
  samples they leave the gradient, though their residual still pulls to the same optimum. In
  `tbrm` the value moves too, so it never follows the gradient of the policy alone.

## All numbers

Critics are at rest (exact values of the sampling policy), moving baselines too; greedy baselines are
exact, those of the reference have many samples. Methods with an optimizer of their own show the
gradient that it gets. Left out: {left_out}.

{tables}
"""


def write_page(rows: dict[str, dict[str, Point]]) -> None:
  groups = grouped(rows)
  header = '| method | ' + ' | '.join(f'angle, noise, progress at {s}' for s in STALENESS) + ' |'
  tables = []
  for title, names in groups.items():
    tables += [f'### {title.capitalize()}', '', header, '|---' * (len(STALENESS) + 1) + '|']
    for name in names:
      cells = [f'{_degrees(p.angle)}, {p.noise:.2f}, {p.progress:.2f}' for p in rows[name].values()]
      tables.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
    tables.append('')
  policies = trajectory()
  now = probabilities(policies[-1])
  kls = [
    np.sum(p * np.log(p / now))
    for s in STALENESS
    for p in [probabilities(policies[len(policies) - 1 - s])]
  ]
  text = PAGE.format(
    sequences=len(POLICY.tokens),
    group=GROUP,
    groups=len(POLICY.tokens) ** GROUP,
    steps=max(STALENESS),
    before=probabilities(policies[0]) @ REWARDS,
    after=now @ REWARDS,
    kls=', '.join(f'{kl:.4f} at {s}' for s, kl in zip(STALENESS, kls) if s),
    reading=reading(rows, groups),
    left_out='; '.join(f'`{k}` ({v})' for k, v in LEFT_OUT.items()),
    tables='\n'.join(tables).rstrip(),
  )
  (DOCS / 'estimators.md').write_text(text)
  numbers = {n: {s: p._asdict() for s, p in own.items()} for n, own in rows.items()}
  (DOCS / 'estimators.json').write_text(json.dumps(numbers, indent=1) + '\n')


def _degrees(angle: float) -> str:
  return '0' if angle < 1e-4 else f'{angle:.1f}'


def reading(rows: dict[str, dict[str, Point]], groups: dict[str, list[str]]) -> str:
  """The findings, from the numbers."""
  last = str(max(STALENESS))
  listed = lambda names: ', '.join(f'`{n}`' for n in names) or 'none'
  broken = sorted((n for n in rows if rows[n][last].angle > 60), key=lambda n: -rows[n][last].angle)
  steady = [n for n in rows if rows[n][last].angle < 15 and rows[n][last].progress > 0.3]
  quiet = sorted(rows, key=lambda n: rows[n]['0'].noise)[:5]
  best = sorted(rows, key=lambda n: -rows[n][last].progress)[:8]
  lines = {
    f'Unbiased on-policy, and still at staleness {last}': groups['exact on-policy and stale'],
    'Unbiased on-policy only': groups['exact on-policy'],
    f'Further than 60 degrees off at staleness {last}': broken,
    f'Within 15 degrees and above progress 0.3 at staleness {last}': sorted(steady),
    'The least noise on-policy': quiet,
    f'The most progress at staleness {last}': best,
  }
  return '\n'.join(f'* {title}: {listed(names)}.' for title, names in lines.items())


def draw(rows: dict[str, dict[str, Point]]) -> None:
  """Left: progress of every method at every staleness. Right: angle against noise."""
  names = sorted(rows, key=lambda n: -rows[n]['0'].progress)
  progress = np.array([[p.progress for p in rows[n].values()] for n in names])
  figure, (left, *right) = plt.subplots(
    1, 3, figsize=(17, 0.16 * len(names) + 1.5), layout='constrained', width_ratios=(1, 1.3, 1.3)
  )
  image = left.imshow(progress, aspect='auto', cmap='RdYlGn', vmin=-0.6, vmax=0.6)
  left.set_yticks(range(len(names)), names, fontsize=7)
  left.set_xticks(range(len(STALENESS)), STALENESS)
  left.set_xlabel('staleness, gradient steps')
  left.set_title('progress of a step')
  figure.colorbar(image, ax=left, location='bottom', shrink=0.8)
  for axis, staleness in zip(right, (0, max(STALENESS))):
    points = np.array([rows[n][str(staleness)][:3:2] for n in names])
    axis.scatter(points[:, 0], points[:, 1], s=14, c=progress[:, 0], cmap='viridis')
    together = collections.defaultdict(list)
    for name, (angle, noise) in zip(names, points):
      together[round(angle / 2), round(25 * np.log(noise))].append((name, angle, noise))
    for near in together.values():
      label = ', '.join(name for name, _, _ in near[:2])
      label += f' + {len(near) - 2}' if len(near) > 2 else ''
      axis.annotate(label, near[0][1:], fontsize=7, xytext=(3, 3), textcoords='offset points')
    axis.axvline(90, color='gray', lw=0.7, ls=':')
    axis.set_yscale('log')
    axis.set_yticks((1, 1.5, 2, 3, 4, 6), ('1', '1.5', '2', '3', '4', '6'), minor=False)
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_xlim(-5, 130)
    axis.set_xlabel('angle to the stated gradient, degrees')
    axis.set_ylabel('noise: standard deviation / mean')
    axis.set_title(f'staleness {staleness}')
    axis.grid(alpha=0.3)
  figure.savefig(DOCS / 'estimators.png', dpi=110)
  plt.close(figure)


def report(names: list[str]) -> dict[str, dict[str, Point]]:
  rows = {}
  for name in names:
    rows[name] = measure(load(name))
    told = [f'{s}: {p.angle:6.2f} {p.noise:5.2f} {p.progress:6.3f}' for s, p in rows[name].items()]
    print(f'{name:30s}', *told, flush=True)
  return rows


def all_names() -> list[str]:
  folder = ROOT / 'experiments' / 'policy_gradient'
  return sorted(p.stem for p in folder.glob('*.py') if p.stem not in {'__init__', *LEFT_OUT})


def main() -> None:
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
  with jax.enable_x64(True):
    rows = report(all_names())
  draw(rows)
  write_page(rows)


if __name__ == '__main__':
  main()
