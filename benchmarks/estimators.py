"""The estimator report: bias and noise of every policy-gradient method, exactly.

    python -m benchmarks.estimators              # all methods; writes docs/estimators.md, .json and .png
    python -m benchmarks.estimators grpo cispo   # measures these again and merges them into the report
    python -m benchmarks.estimators --new        # measures methods that the report does not have yet
    python -m benchmarks.estimators --table      # writes the page from the numbers that there are

Credit and objective of each method get every group of four samples that a tiny policy can produce, and
the mean and covariance of the resulting gradient are compared with the gradient of what the method
states that it maximises (`tiny_world.STATED`). docs/estimators.md says how to read the report.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import arguments, estimators_page
from benchmarks import tiny_world as world
from polgrad import credit as credits
from polgrad import methods, objectives
from polgrad.losses import logit_stats
from polgrad.options import from_text
from polgrad.registry import bind
from polgrad.tabular.estimators import Distribution, Setting, gradient_distributions

GROUP = 4
# Measured over several prompts by benchmarks/sampling_estimators.py.
CHANGE_SAMPLES = (
  'agentic_arpo',
  'exit_iteration',
  'grace',
  'hnpg',
  'igpo',
  'pf_ppo',
  'prioritized_replay',
  'props',
  'spo_single_stream',
  'treerl',
  'uft',
  'v0',
)
# Not estimators from rollouts of one policy, or the same as another.
LEFT_OUT = {
  **dict.fromkeys(
    CHANGE_SAMPLES,
    'changes what is sampled; measured [below](#where-a-method-changes-what-is-sampled)',
  ),
  'otr': 'learns from demonstrations',
  **dict.fromkeys(('pure', 'text2grad'), 'reads scores of steps, which no reward determines'),
  'gtpo': 'drops rows with a mean entropy above .7 nats, which all rows of this policy have',
  'prime': 'its reward model learns during the run',
  **dict.fromkeys(
    ('rlfr', 'rdd', 'amago'), 'its rewards come from a network that learns during the run'
  ),
  **dict.fromkeys(('l1_exact', 'l1_max'), 'changes the reward; its estimator is GRPO without a KL'),
  'gradient_guided': 'the weights of its rewards follow from gradients of the run',
}


class Estimate(NamedTuple):
  """The parts of a method that make its gradient."""

  name: str
  phase: dict
  credit: credits.Estimator
  objective: objectives.Objective


def load(name: str) -> Estimate:
  phase = from_text(f'method={name},task=addition,model=tiny').phases.train
  credit = bind(phase.credit, credits.TABLE)
  return Estimate(name, phase.to_dict(), credit, bind(phase.objective, objectives.TABLE))


def setting_of(one: Estimate, staleness: int) -> Setting:
  """What the method's rollouts would hold at this staleness."""
  history = world.trajectory()
  live, behavior = history[-1], history[len(history) - 1 - staleness]
  phase, collect = one.phase, one.phase['collect']
  anchors = {'reference': world.reference(), 'teacher': behavior}
  follows = phase['anchors'].get('reference', {}).get('every', np.inf)
  if follows <= phase['epochs'] * phase['minibatches']:  # taken anew for every batch
    anchors['reference'] = behavior
  if collect.get('recompute_proximal'):
    anchors['proximal'] = live
  features = {}
  rows = GROUP + collect.get('demonstrations', 0)
  if collect.get('baseline_samples'):
    behavior_policy = collect['baseline_policy']['name'].partition('.')[2]
    features['baseline_rewards'] = world.baseline_rewards(behavior_policy, live, rows)
  # TOPR counts a wrong answer as -1.
  rewards = 2 * world.REWARDS - 1 if 'offset' in phase['reward'] else world.REWARDS
  return Setting(
    policy=world.POLICY,
    rewards=rewards,
    params=jnp.asarray(live),
    behavior=jnp.asarray(behavior),
    anchors={k: jnp.asarray(v) for k, v in anchors.items()},
    values=world.values_of(one.name, phase, behavior),
    features=features,
    staleness=float(staleness),
    demonstration=world.DEMONSTRATION if collect.get('demonstrations') else -1,
    arrays=world.terms(collect.get('terms', ())),
  )


def credit_state_of(one: Estimate):
  """Moving baselines at rest: the mean reward so far."""
  if one.phase['credit']['name'] != 'credit.moving_baseline':
    return None
  mean = world.probabilities(world.trajectory()[-1]) @ world.REWARDS
  return {'total': jnp.asarray(mean), 'weight': jnp.asarray(1.0)}


class Point(NamedTuple):
  """One estimator at one staleness."""

  angle: float  # degrees between the expected gradient and the stated one
  strength: float  # length of the expected gradient over that of the stated one
  noise: float  # standard deviation over the length of the expected gradient
  progress: float  # E[g] . direction / sqrt(E |g|^2): ascent a step of unit size buys, at most 1


def measure(one: Estimate) -> dict[str, Point]:
  """The estimator at every staleness.

  Raises:
    ValueError: its expected gradient is zero.
  """
  settings = [setting_of(one, s) for s in world.STALENESS]
  collected = one.phase['collect'].get('stats', {})
  stats = {name: bind(spec, logit_stats.TABLE) for name, spec in collected.items()}
  found = gradient_distributions(
    settings,
    one.credit,
    one.objective,
    rows_per_prompt=GROUP,
    stats=stats,
    credit_state=credit_state_of(one),
  )
  if not all(np.abs(distribution.mean).max() > 1e-12 for distribution in found):
    raise ValueError(
      f'{one.name}: its expected gradient is zero in groups of {GROUP}; choose other defaults, or write '
      'into LEFT_OUT why it has no entry'
    )
  climbed = jax.grad(world.stated(one.name, one.phase))
  return {
    str(s): compare(distribution, climbed(setting.params, setting.behavior))
    for s, setting, distribution in zip(world.STALENESS, settings, found)
  }


def compare(found: Distribution, true) -> Point:
  true = np.asarray(true).ravel()
  length, along = np.linalg.norm(found.mean), found.mean @ true / np.linalg.norm(true)
  size = np.sqrt(found.variance + length**2)
  return Point(
    angle=float(np.degrees(np.arccos(np.clip(along / max(length, 1e-300), -1, 1)))),
    strength=float(length / np.linalg.norm(true)),
    noise=float(np.sqrt(found.variance) / max(length, 1e-300)),
    progress=float(along / size) if size > 0 else 0.0,
  )


def report(names: list[str]) -> estimators_page.Rows:
  """Measures the methods and prints a line for each."""
  rows = {}
  for name in names:
    rows[name] = measure(load(name))
    told = [f'{s}: {p.angle:6.2f} {p.noise:5.2f} {p.progress:6.3f}' for s, p in rows[name].items()]
    print(f'{name:30s}', *told, flush=True)
  return rows


def stored() -> estimators_page.Rows:
  """The numbers of the last report, without methods that are gone."""
  numbers = json.loads(estimators_page.NUMBERS.read_text())
  return {n: {s: Point(**p) for s, p in numbers[n].items()} for n in numbers if n in all_names()}


def all_names() -> list[str]:
  return sorted(set(methods.FAMILIES['policy_gradient']) - LEFT_OUT.keys())


def main() -> None:
  before, chosen = arguments.parse(__doc__.splitlines()[0], all_names(), stored)
  with jax.enable_x64(True):
    found = report(chosen)
  rows = dict(sorted((before | found).items()))
  estimators_page.draw(rows)
  estimators_page.write(rows, group=GROUP, left_out=LEFT_OUT)


if __name__ == '__main__':
  main()
