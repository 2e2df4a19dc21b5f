"""The preference report: where the gradient flow of every preference method ends, exactly.

    python -m benchmarks.preferences             # all methods; writes docs/preferences.*
    python -m benchmarks.preferences dpo ipo     # computes these again and merges them into the report
    python -m benchmarks.preferences --new       # computes methods that the report does not have yet
    python -m benchmarks.preferences --table     # writes the page from the numbers that there are

Credit and objective of a method get every pair of sequences of a tiny policy with its probability. The
exact expected gradient is followed from the reference to where it vanishes. docs/preferences.md says how
to read the report.
"""

import inspect
import itertools
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar

from benchmarks import arguments, preferences_page
from benchmarks import preference_world as world
from polgrad import credit as credits
from polgrad import methods, optim
from polgrad.collect import picks
from polgrad.methods import Method
from polgrad.registry import name_of
from polgrad.sampling import behavior_policies
from polgrad.tabular import enumerable
from polgrad.tabular.estimators import Setting, rollout_loss

END = 1e6  # of the flow, in units in which the first step has speed 1
STILL = 1e-9  # the flow has ended where its speed is below this
EVALUATIONS = 3000  # of the gradient; a flow that needs more has no end or runs along a kink
DESCENT = 20_000  # steps of plain descent with falling lengths, where the loss has kinks
FAR = 1e3  # a flow that comes so far without an end has no kink in its way
SETTLED = 1e-3  # descent has ended where no probability moves more in its second half
# What the exact setting has of a group of sequences, apart from log-probs of anchors.
GIVEN = {
  *('logp', 'entropy', 'mask', 'tokens', 'segment_ids', 'turn_ids', 'group_ids', 'prompt_ids'),
  *('behavior_logp', 'label', 'rewards', 'valid', 'wins', 'baseline_wins', 'staleness', 'step'),
  *('logits', 'teacher_logits'),
}
# Choices that take the pair itself where a group has two rows.
EXTREMES = tuple(map(name_of, (picks.best_worst, picks.best_worst_by_wins, picks.tournament)))
# What a collector does that a pair drawn from one policy does not show -> why the method is left out.
COLLECTED = {
  'choose': 'the collector chooses the rows to train on out of more samples',
  'demonstrations': 'learns from demonstrations as well',
  'preferences': 'mixes pairs of the data with samples of the policy',
  'opponents': 'the sequences of a group have different samplers',
  'stats': 'the collector measures statistics',
}
# method -> why it is left out, if its arrays do not say it
LEFT_OUT = {'comal': 'its two anchors follow the policy at different speeds'}
BUDGETS = {
  **{'max_new_tokens': 2, 'samples_per_prompt': 2, 'steps': 100, 'learning_rate': 0.01},
  'candidates': 2,
}


class Found(NamedTuple):
  """Where a flow ends."""

  ended: bool  # whether it is at rest there
  speed: float  # length of the gradient there, over that at the start
  tilt: float | None  # total variation to reference exp(r / T) / Z at the best T; None: no rewards
  tilt_temperature: float | None  # that T, in units of the reward
  nash: float  # total variation to reference exp(P(. > pi) / T) / Z at the best T
  nash_temperature: float  # that T
  response: float  # total variation to reference exp(P(. > other) / T) / Z at the best T
  response_temperature: float  # that T
  chosen: float  # change of E[log pi(chosen)] from the reference, nats
  rejected: float  # change of E[log pi(rejected)] from the reference, nats
  unseen: float  # probability of the sequences that the data lacks
  largest: float  # probability of the most likely sequence
  win_rate: float  # P(pi > reference)
  kl: float  # KL(pi || reference), nats


def load(name: str) -> Method:
  """The method with `TEMPERATURE` as the coefficient of its fixed anchor."""
  function = getattr(methods, name)
  takes = inspect.signature(function).parameters
  budgets = {k: v for k, v in BUDGETS.items() if k in takes}
  method = function(**budgets)
  if not method.anchors:
    return method
  coefficients = {k: world.TEMPERATURE for k in ('beta', 'tau') if k in takes}
  if {'tau', 'eta'} <= takes.keys():  # the step of mirror descent, in units of tau
    coefficients['eta'] = 3 * world.TEMPERATURE
  return function(**budgets, **coefficients)


def left_out(name: str) -> str:
  """Why a method has no place in the report; '' if it has one."""
  if name in LEFT_OUT:
    return LEFT_OUT[name]
  method = load(name)
  asked = method.collect.keywords
  for keyword, reason in COLLECTED.items():
    given = asked.get(keyword)
    of_two = keyword == 'choose' and given and given['name'] in EXTREMES and not given.get('second')
    if given and not of_two:
      return reason
  if method.bound()[1].select is not None:
    return 'its selection looks at a whole batch, and the report gives it one pair at a time'
  missing = sorted(
    read for read in method.reads if read not in GIVEN and not read.endswith('_logp')
  )
  if missing:
    return f'reads {", ".join(missing)}, which the exact setting lacks'
  return ''


def anchors_of(method: Method) -> set[str]:
  read = {r.removesuffix('_logp') for r in method.reads if r.endswith('_logp')}
  return {'reference', *method.anchors, *read} - {'behavior'}


def follows(method: Method, anchor: str) -> bool:
  """Whether an anchor moves with the policy, so that at rest it is the policy."""
  rule = method.anchors.get(anchor)
  return anchor != 'reference' if rule is None else rule.name != name_of(optim.fixed)


def sampler(method: Method, slot: str, live):
  """Logits of the policy that samples for a method: `behavior_policy`, or `baseline_policy`."""
  spec = method.collect.keywords.get(slot) or {'name': name_of(behavior_policies.current)}
  reference = live if follows(method, 'reference') else jnp.asarray(world.reference())
  if spec['name'] == name_of(behavior_policies.reference):
    return reference
  if spec['name'] == name_of(behavior_policies.geometric_mixture):
    weight = spec['reference_weight']
    return (1 - weight) * jax.nn.log_softmax(live) + weight * jax.nn.log_softmax(reference)
  return live  # `previous` and moving averages are the policy, at rest


def opponent(method: Method, logits: np.ndarray) -> np.ndarray:
  """Distribution of the sequences that a method with its own samples compares with, f64[S]."""
  slot = 'baseline_policy' if 'baseline_wins' in method.reads else 'behavior_policy'
  return world.probabilities(sampler(method, slot, jnp.asarray(logits)))


def kind_of(method: Method) -> str:
  """What is told of a pair: 'verdict', which row won; 'wins', the probabilities."""
  probabilities = map(name_of, (credits.win_rate_gap, credits.of_wins))
  return 'wins' if method.credit.name in probabilities else 'verdict'


class Arrays(NamedTuple):
  """What differs between preferences and data, so that one program serves all."""

  wins: np.ndarray  # f64[S, S]
  own: float  # 1: the method samples; 0: `logits` do
  logits: np.ndarray  # f64[P, 3]
  seen: np.ndarray  # f64[S], 1 where a sequence can occur


def arrays_of(preferences: world.Preferences, data: world.Data) -> Arrays:
  return Arrays(
    wins=preferences.wins,
    own=float(data.logits is None),
    logits=world.reference() if data.logits is None else data.logits,
    seen=data.seen.astype(float),
  )


def make_field(method: Method) -> Callable:
  """(logits f64[P, 3], Arrays) -> the exact expected gradient of the method's loss, f64[P, 3].

  Rows are the chosen and the rejected sequence of a pair, whose probability is
  2 mu(chosen) mu(rejected) P(chosen > rejected). The rewards of the two rows are 1 and 0. Methods that
  read probabilities get all pairs, with the probability mu mu. Anchors that follow the policy are it.
  """
  credit, objective = method.bound()
  kind = kind_of(method)
  pairs = np.indices((world.SIZE, world.SIZE)).reshape(2, -1).T
  reference = jnp.asarray(world.reference())
  distribution = lambda logits: jnp.exp(jnp.sum(enumerable.logp(world.POLICY, logits), axis=1))

  def told(pair, arrays, other):
    won = jnp.array([1.0, 0.0])
    wins = arrays.wins[pair][:, pair] if kind == 'wins' else jnp.array([[0.5, 1.0], [0.0, 0.5]])
    against = (arrays.wins @ distribution(other))[pair][:, None]
    return {'label': won, 'rewards': won, 'wins': wins, 'baseline_wins': against}

  def field(live, arrays):
    behavior = jnp.where(arrays.own > 0, sampler(method, 'behavior_policy', live), arrays.logits)
    mu = distribution(behavior) * arrays.seen
    mu = mu / jnp.sum(mu)
    weight = mu[pairs[:, 0]] * mu[pairs[:, 1]]
    if kind == 'verdict':
      weight = 2 * weight * arrays.wins[pairs[:, 0], pairs[:, 1]]
    against = sampler(method, 'baseline_policy', live)
    setting = Setting(
      policy=world.POLICY,
      rewards=np.zeros(world.SIZE),
      params=live,
      behavior=behavior,
      anchors={name: live if follows(method, name) else reference for name in anchors_of(method)},
      values=np.zeros(world.POLICY.tokens.shape),
    )

    def one(params, pair):
      given = setting._replace(features=told(pair, arrays, against))
      return rollout_loss(
        given, credit, objective, params, pair, {}, credit.init(), jax.random.key(0)
      )

    mean = lambda params: weight @ jax.vmap(lambda pair: one(params, pair))(pairs)
    return jax.grad(mean)(live)

  return jax.jit(field)


def flow(field: Callable) -> tuple[np.ndarray, bool, float]:
  """Follows d logits / dt = -field from the reference.

  Returns:
    The last logits, whether the flow has ended there, and its speed over that at the start.
  """
  start = world.reference()
  size = np.linalg.norm(field(start))
  if size < 1e-14:
    return start, True, 0.0
  calls, last = itertools.count(), [0.0, start.ravel()]

  def speed(x):
    return -np.asarray(field(x.reshape(start.shape))).ravel() / size

  def moving(t, x):
    if next(calls) > EVALUATIONS:
      raise Kinked
    if t > last[0]:
      last[:] = t, x
    return speed(x)

  try:
    found = solve_ivp(
      moving, (0, END), start.ravel(), method='BDF', rtol=1e-7, atol=1e-9, t_eval=[END]
    )
    if found.success:
      last[:] = END, found.y[:, -1]
  except Kinked:
    pass
  if last[0] < FAR:
    return descent(field, start, size)
  logits = polish(speed, last[1])
  left = float(np.linalg.norm(speed(logits)))
  return logits.reshape(start.shape), left < STILL, left


class Kinked(Exception):
  """The flow takes too many steps, as it does where the loss has no derivative, or moves forever."""


def descent(field: Callable, start: np.ndarray, size: float) -> tuple[np.ndarray, bool, float]:
  """`flow` by steps whose lengths fall as 1 / number, for losses with kinks."""

  @jax.jit
  def steps(x, first, count):
    move = lambda i, x: x - 0.2 / (1 + i / 100) * field(x) / size
    return jax.lax.fori_loop(first, first + count, move, x)

  half = steps(start, 0, DESCENT // 2)
  logits = np.asarray(steps(half, DESCENT // 2, DESCENT // 2))
  moved = np.abs(world.probabilities(logits) - world.probabilities(half)).max()
  return logits, bool(moved < SETTLED), float(np.linalg.norm(field(logits)) / size)


def polish(speed: Callable, x: np.ndarray) -> np.ndarray:
  """Newton steps of least length, which do not move along directions without a gradient."""
  for _ in range(4):
    step = 1e-5
    columns = [
      (speed(x + step * unit) - speed(x - step * unit)) / (2 * step) for unit in np.eye(len(x))
    ]
    move = np.linalg.pinv(np.stack(columns, axis=1), rcond=1e-7) @ speed(x)
    if np.abs(move).max() > 0.05 or np.linalg.norm(speed(x - move)) > np.linalg.norm(speed(x)):
      break
    x = x - move
  return x


def nearest(pi: np.ndarray, q: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
  """The least total variation between pi and reference exp(q / T) / Z over T, and that T.

  Both are distributions over the sequences of `seen`, bool[S].
  """
  pi, q = pi[seen] / pi[seen].sum(), q[seen]
  reference = world.probabilities(world.reference())[seen]

  def distance(log_t):
    tilted = reference * np.exp((q - q.max()) / np.exp(log_t))
    return 0.5 * np.abs(pi - tilted / tilted.sum()).sum()

  grid = np.linspace(np.log(0.01), np.log(1e4), 200)
  best = grid[np.argmin([distance(x) for x in grid])]
  width = grid[1] - grid[0]
  found = minimize_scalar(
    distance, bounds=(best - width, best + width), method='bounded', options={'xatol': 1e-12}
  )
  return float(found.fun), float(np.exp(found.x))


def measure(
  method: Method, field: Callable, preferences: world.Preferences, data: world.Data
) -> Found:
  """Where the flow of `make_field` ends."""
  arrays = arrays_of(preferences, data)
  logits, ended, speed = flow(lambda logits: field(logits, arrays))
  pi, mu = world.probabilities(logits), world.sampled(data, logits)
  reference = world.probabilities(world.reference())
  log_pi, log_reference = (
    np.asarray(enumerable.logp(world.POLICY, x)).sum(axis=1) for x in (logits, world.reference())
  )
  wins, gain = preferences.wins, log_pi - log_reference
  tilt = (
    (None, None) if preferences.rewards is None else nearest(pi, preferences.rewards, data.seen)
  )
  seen = pi * data.seen / pi[data.seen].sum()  # what the policy is on the data
  nash = nearest(pi, wins @ seen, data.seen)
  response = nearest(
    pi, wins @ (mu if data.logits is not None else opponent(method, logits)), data.seen
  )
  chosen = 2 * mu * (wins @ mu)  # distribution of the preferred sequence of a pair
  return Found(
    ended,
    speed,
    *tilt,
    *nash,
    *response,
    chosen=float(chosen @ gain),
    rejected=float((2 * mu - chosen) @ gain),
    unseen=float(pi[~data.seen].sum()),
    largest=float(pi.max()),
    win_rate=float(pi @ wins @ reference),
    kl=float(pi @ gain),
  )


def report(names: list[str]) -> preferences_page.Rows:
  """Computes the methods and prints a line for each."""
  rows = {}
  for name in names:
    method, began = load(name), time.monotonic()
    field = make_field(method)
    rows[name] = {
      preferences.name: {
        data.name: measure(method, field, preferences, data)._asdict() for data in world.sources()
      }
      for preferences in (world.bradley_terry(), world.game())
    }
    told = preferences_page.cells(rows[name])
    print(f'{name:20s} {time.monotonic() - began:5.1f} s ', *told, sep=' | ', flush=True)
  return rows


def stored() -> preferences_page.Rows:
  """The numbers of the last report, without methods that are gone."""
  numbers = json.loads(preferences_page.NUMBERS.read_text())
  return {n: numbers[n] for n in numbers if n in all_names()}


def reasons() -> dict[str, str]:
  """Why methods are left out, by name."""
  found = {name: left_out(name) for name in sorted(methods.FAMILIES['preference'])}
  return {name: reason for name, reason in found.items() if reason}


def all_names() -> list[str]:
  return sorted(set(methods.FAMILIES['preference']) - reasons().keys())


def main() -> None:
  before, chosen = arguments.parse(__doc__.splitlines()[0], all_names(), stored)
  with jax.enable_x64(True):
    found = report(chosen)
  rows = dict(sorted((before | found).items()))
  preferences_page.draw(rows)
  preferences_page.write(rows, left_out=reasons())


if __name__ == '__main__':
  main()
