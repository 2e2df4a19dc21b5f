"""Distillation on completions that were drawn once, by a student that was tuned on one of two teachers.

    python -m benchmarks.teacher_consistency     # writes a table of docs/distillation.md

Sequences have three tokens out of three, and policies a logit for every token after every prefix, so all
expectations are finite sums, in float64. Teacher A begins almost always with token 0, teacher B with
token 2; what follows is random and differs. The student was tuned on A's text: its logits are those of A
with noise of standard deviation 0.3. It then descends towards A or B with step size 1, along the
gradient of `lightning_opd` (frozen completions, of the student before the first step: all sequences with
their probabilities, or a sample of 64) or of `sampled_distillation` (fresh completions).
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad.tabular import enumerable

POLICY = enumerable.table(3, 3)
STEPS = (0, 50, 200, 2000)
PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'distillation.md'
BEGIN, END = '<!-- begin of the teachers -->', '<!-- end of the teachers -->'
BIAS = 4.0  # of the logit of a teacher's usual first token


class World(NamedTuple):
  """Logits f64[P, V] of two teachers and of the student that was tuned on the first."""

  a: np.ndarray
  b: np.ndarray
  student: np.ndarray


def world(seed: int = 0) -> World:
  """Two teachers and the student of teacher A."""
  random = np.random.default_rng(seed)
  a, b = random.normal(size=(2, 13, 3))
  first = POLICY.prefixes[0, 0]
  a[first, 0] += BIAS
  b[first, 2] += BIAS
  return World(a, b, a + 0.3 * random.normal(size=a.shape))


def sequence_logp(params: jax.Array) -> jax.Array:
  """Log-probabilities of all sequences, f64[S]."""
  return jnp.sum(enumerable.logp(POLICY, params), axis=1)


def kl(params: jax.Array, teacher: jax.Array) -> jax.Array:
  """KL(student || teacher) of sequences."""
  own = sequence_logp(params)
  return jnp.sum(jnp.exp(own) * (own - sequence_logp(teacher)))


def direction(params: jax.Array, teacher: jax.Array, weight: jax.Array) -> jax.Array:
  """The ascent direction sum_y w(y) sum_t A_t grad log S(y_t), A = log T - log S; w is f64[S]."""
  logp, other = (enumerable.logp(POLICY, x) for x in (params, teacher))
  advantages = jax.lax.stop_gradient(other - logp)
  surrogate = lambda x: jnp.sum(weight * jnp.sum(advantages * enumerable.logp(POLICY, x), axis=1))
  return jax.grad(surrogate)(params)


def probabilities(params: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(jnp.exp(sequence_logp(params)))


def drawn(params: jax.Array, count: int = 64) -> np.ndarray:
  """The frequencies of all sequences in a sample."""
  p = np.asarray(probabilities(params))
  return np.random.default_rng(1).multinomial(count, p / p.sum()) / count


def constant(weight: jax.Array) -> Callable[[jax.Array], jax.Array]:
  return lambda params: weight


# Weights of the sequences by kind of completions: student before the first step -> (student -> f64[S]).
WEIGHTS = {
  'frozen, all': lambda start: constant(probabilities(start)),
  'frozen, 64': lambda start: constant(drawn(start)),
  'fresh': lambda start: probabilities,
}


def descend(student: np.ndarray, teacher: np.ndarray, kind: str) -> list[float]:
  """KL(student || teacher) after each number of `STEPS`; `kind` is one of `WEIGHTS`."""
  start = jnp.asarray(student)
  weight = WEIGHTS[kind](start)
  step = lambda _, x: x + direction(x, jnp.asarray(teacher), weight(x))
  run = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, step, x))
  params, done, found = start, 0, []
  for steps in STEPS:
    params, done = run(params, steps - done), steps
    found.append(float(kl(params, teacher)))
  return found


def rows() -> dict[tuple[str, str], list[float]]:
  """The divergences by teacher and completions."""
  with jax.enable_x64(True):
    one = world()
    return {
      (name, kind): descend(one.student, teacher, kind)
      for name, teacher in (('A', one.a), ('B', one.b))
      for kind in WEIGHTS
    }


def page(found: dict[tuple[str, str], list[float]]) -> str:
  head = ' | '.join(f'{steps}' for steps in STEPS)
  lines = [f'| teacher | completions | {head} |', '|---' * (2 + len(STEPS)) + '|']
  lines += [
    f'| {name} | {kind} | {" | ".join(f"{x:.2g}" for x in values)} |'
    for (name, kind), values in found.items()
  ]
  return '\n'.join(lines)


def main() -> None:
  table = page(rows())
  before, rest = PAGE.read_text().split(BEGIN)
  PAGE.write_text(f'{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}')
  print(table)


if __name__ == '__main__':
  main()
