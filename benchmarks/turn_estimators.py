"""How good is each credit over several turns? The exact bias and noise of its gradient on two turns.

python -m benchmarks.turn_estimators        # measures all; --new: those that the report does not have

Writes docs/turn_estimators.json and its part of docs/estimators.md, which says how to read it.
"""

import argparse
import functools
import inspect
import json
from collections.abc import Collection

import jax
import numpy as np

from benchmarks import estimators, estimators_page
from polgrad import credit, methods, objectives
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import bind
from polgrad.tabular import turns
from polgrad.tabular.estimators import gradient_distributions

WORLDS = {'deterministic': turns.deterministic, 'stochastic': turns.stochastic}
GROUP = 4
RAW, LOO, MEAN = advantages.raw, advantages.leave_one_out, advantages.group_mean
STD = advantages.group_normalized
REINFORCE = objectives.PolicyGradient(
  surrogate=surrogates.reinforce, aggregation=aggregation.sequence_sum
)
TO_GO, GIGPO = credit.turn_returns, credit.gigpo
PLAIN = {'normalizer': advantages.identity}
# Credit alone, with the loss of REINFORCE summed over tokens.
CREDITS = {
  'outcome': credit.outcome(advantage=RAW),
  'outcome, leave-one-out': credit.outcome(advantage=LOO),
  'outcome, mean and deviation': credit.outcome(advantage=STD),
  'outcome, discounted .9, leave-one-out': credit.discounted_outcome(advantage=LOO, discount=0.9),
  'turn returns': TO_GO(advantage=RAW),
  'turn returns, leave-one-out by number': TO_GO(advantage=LOO),
  'turn returns, leave-one-out by number, discounted .9': TO_GO(advantage=LOO, discount=0.9),
  'turn returns, leave-one-out by state': TO_GO(advantage=LOO, among='state'),
  'turn returns, mean by state': TO_GO(advantage=MEAN, among='state'),
  'turn returns, mean and deviation of all turns': TO_GO(advantage=STD, among='group'),
  'GiGPO, mean': GIGPO(advantage=MEAN, discount=1.0),
  'GiGPO, mean, discounted .95': GIGPO(advantage=MEAN, discount=0.95),
  'GiGPO, mean and deviation': GIGPO(advantage=STD, discount=0.95),
  'GiGPO, mean and deviation, statistics per turn': GIGPO(advantage=STD, per='turn'),
  'GAE of tokens, lambda .95': credit.generalized(**PLAIN),
  'GAE of turns, lambda .95': credit.turn_generalized(**PLAIN),
  'bi-level GAE, turn discount .95': credit.bilevel_generalized(**PLAIN),
  'bi-level GAE, no discount': credit.bilevel_generalized(turn_discount=1.0, **PLAIN),
}
# Whole methods that maximise E[R]; `ppo` without its entropy bonus.
METHODS = {
  **{n: {} for n in ('reinforce', 'rloo', 'grpo', 'dr_grpo', 'dapo', 'reinforce_plus_plus')},
  'ppo': {'entropy_coefficient': 0.0},
  **{n: {} for n in ('turn_rloo', 'turn_grpo', 'areal_retry', 'gigpo', 'simpletir', 'ragen')},
  'turn_ppo': {},
}
BUDGETS = {'max_new_tokens': 5}


def parts(name: str):
  """Credit and objective of a row of the report."""
  if name in CREDITS:
    return CREDITS[name], REINFORCE
  function = methods.TABLE[name]
  names = inspect.signature(function).parameters
  method = function(**METHODS[name], **{k: v for k, v in BUDGETS.items() if k in names})
  return bind(method.credit, credit.TABLE), bind(method.objective, objectives.TABLE)


@functools.cache
def world_of(name: str):
  """An environment, and logits of a policy that has learned a little of it."""
  world = turns.episodes(WORLDS[name])
  shape = int(world.policy.prefixes.max()) + 1, 2
  params = 0.7 * np.random.default_rng(0).normal(size=shape)
  climb = jax.jit(jax.grad(lambda x: turns.objective(world, x)))
  for _ in range(4):
    params = params + 0.5 * np.asarray(climb(params))
  return world, params, np.asarray(climb(params))


def measure(name: str, worlds: Collection[str] = tuple(WORLDS)) -> dict[str, estimators.Point]:
  """One row of the report, by environment."""
  estimator, objective = parts(name)
  found = {}
  for key in worlds:
    world, params, true = world_of(key)
    settings = [turns.setting(world, params)]
    moments = gradient_distributions(
      settings, estimator, objective, rows_per_prompt=GROUP, chunk=10000
    )
    found[key] = estimators.compare(moments[0], true)
  return found


def all_names() -> list[str]:
  return [*CREDITS, *METHODS]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--new', action='store_true', help='those that the report does not have')
  arguments = parser.parse_args()
  path = estimators_page.TURNS
  before = json.loads(path.read_text()) if arguments.new and path.exists() else {}
  rows = {}
  with jax.enable_x64(True):
    for name in all_names():
      rows[name] = before.get(name) or {k: p._asdict() for k, p in measure(name).items()}
      print(
        f'{name:55s}',
        *(f'{p["angle"]:6.2f} {p["noise"]:6.2f}' for p in rows[name].values()),
        flush=True,
      )
  path.write_text(json.dumps(rows, indent=1) + '\n')
  estimators_page.write(estimators.stored(), group=estimators.GROUP, left_out=estimators.LEFT_OUT)


if __name__ == '__main__':
  main()
