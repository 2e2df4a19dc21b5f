"""When do on-policy samples and negative gradients matter: a bandit of 100 arms (arXiv:2404.14367).

    python -m benchmarks.on_policy          # writes docs/on_policy.md in a minute

A policy starts at the distribution of the data and learns from 10 rounds of 100 groups of 10 samples.
On-policy, each round is drawn from the present policy; offline, all rounds are one draw of the data.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polgrad.types import Array

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
ARMS, GROUPS, SAMPLES, ROUNDS, STEPS = 100, 100, 10, 10, 20
LEARNING_RATE = 0.05
TARGET = 10.0  # of IPO's log-ratio, 1 / (2 tau)
NEGATIVE = 0.5  # weight of the explicit negative gradient
# Bumps of width 10. The data sit at low arms, so one is far from them and one is near.
REWARDS = {
  'mode far from the data': np.exp(-(((np.arange(ARMS) - 70) / 10) ** 2)),
  'mode at the data': np.exp(-(((np.arange(ARMS) - 20) / 10) ** 2)),
}


def data_distribution() -> np.ndarray:
  """Fractions of 10,000 draws of tanh(Cauchy(-0.7, 0.4)) in 100 bins of [-1, 1]; seed 0."""
  draws = np.tanh(-0.7 + 0.4 * np.random.default_rng(0).standard_cauchy(10_000))
  counts, _ = np.histogram(draws, bins=ARMS, range=(-1, 1))
  return (counts + 0.5) / (counts + 0.5).sum()  # an arm without a draw keeps a little mass


def best_of_n(log_p: Array, reference: Array, arms: Array, rewards: Array) -> Array:
  """The likelihood of each group's best sample."""
  del reference
  best = jnp.take_along_axis(arms, jnp.argmax(rewards, axis=1, keepdims=True), axis=1)
  return -jnp.mean(log_p[best])


def best_of_n_negative(log_p: Array, reference: Array, arms: Array, rewards: Array) -> Array:
  """The same, less a part of the likelihood of each group's worst sample, until it is unlikely."""
  worst = jnp.take_along_axis(arms, jnp.argmin(rewards, axis=1, keepdims=True), axis=1)
  bounded = jnp.maximum(log_p[worst], jnp.log(1e-4))
  return best_of_n(log_p, reference, arms, rewards) + NEGATIVE * jnp.mean(bounded)


def ipo(log_p: Array, reference: Array, arms: Array, rewards: Array) -> Array:
  """IPO on the best and the worst sample of each group."""
  ratio = (log_p - reference)[arms]
  pick = lambda place: jnp.take_along_axis(ratio, place[:, None], axis=1)
  gap = pick(jnp.argmax(rewards, axis=1)) - pick(jnp.argmin(rewards, axis=1))
  return jnp.mean(jnp.square(gap - TARGET))


def policy_gradient(log_p: Array, reference: Array, arms: Array, rewards: Array) -> Array:
  """REINFORCE with normalised rewards, also where the samples are not the policy's."""
  del reference
  advantages = (rewards - jnp.mean(rewards)) / (jnp.std(rewards) + 1e-6)
  return -jnp.mean(advantages * log_p[arms])


METHODS = {
  'best-of-n': best_of_n,
  'best-of-n and negative gradient': best_of_n_negative,
  'IPO, best and worst': ipo,
  'policy gradient': policy_gradient,
}


@functools.partial(jax.jit, static_argnames=('method', 'on_policy'))
def final_value(method, rewards: Array, key: Array, *, on_policy: bool) -> Array:
  """The expected reward after all rounds, f32[]."""
  reference = jnp.log(jnp.asarray(data_distribution(), jnp.float32))
  optimizer = optax.adam(LEARNING_RATE)

  def round_(carry, number):
    logits, state = carry
    source = jax.nn.log_softmax(logits) if on_policy else reference
    noise = jax.random.fold_in(key, number if on_policy else 0)
    arms = jax.random.categorical(noise, source, shape=(GROUPS, SAMPLES))

    def update(carry, _):
      logits, state = carry
      loss = lambda x: method(jax.nn.log_softmax(x), reference, arms, rewards[arms])
      steps, state = optimizer.update(jax.grad(loss)(logits), state)
      return (logits + steps, state), ()

    return jax.lax.scan(update, (logits, state), length=STEPS)[0], ()

  first = (reference, optimizer.init(reference))
  (logits, _), _ = jax.lax.scan(round_, first, jnp.arange(ROUNDS))
  return jax.nn.softmax(logits) @ rewards


def measure(method, rewards: np.ndarray, *, on_policy: bool, seeds: int = 5) -> np.ndarray:
  """Expected rewards [seeds]."""
  keys = jax.random.split(jax.random.key(0), seeds)
  one = lambda key: final_value(method, jnp.asarray(rewards, jnp.float32), key, on_policy=on_policy)
  return np.asarray(jax.vmap(one)(keys))


PAGE = """# On-policy samples and negative gradients: a bandit that shows when they matter

Made by `python -m benchmarks.on_policy`: {arms} arms, {rounds} rounds of {groups} groups of
{samples} samples, and {steps} Adam steps a round. It is a simplified form, without contexts, of an
experiment of arXiv:2404.14367.

The policy starts at the distribution of the data, most of which is at low arms. One reward has its mode
where the data are, the other far away, where the data have little mass. *Offline* means one draw of
the data for all rounds, *on-policy* a new draw from the policy in each round; losses and number of
updates are the same. The table has expected rewards, means of five seeds with the least and the
largest; 1 is the best possible value.

{table}

## What to read from it

* **If the data cover the good answers, offline samples nearly suffice.** If they do not, no loss makes
  up for samples that never show a good answer; on-policy rounds move towards it step by step.
* **With on-policy samples a negative gradient helps**: losses that also push the worst sample down end
  at least as high as the likelihood of the best one.
* **Offline, the same push may harm**: IPO with its large target ends below the likelihood of the best
  sample, because the mass that leaves the worst ones goes to arms that the data do not show, good or
  bad. The explicit negative gradient stops at a probability of 1e-4, and so neither harms nor helps
  much; without a bound it diverges.
"""


def main() -> None:
  titles = [f'{name}: {kind}' for name in REWARDS for kind in ('offline', 'on-policy')]
  lines = [f'| loss | {" | ".join(titles)} |', '|---' * (len(titles) + 1) + '|']
  reference = data_distribution()
  for name, method in METHODS.items():
    cells = []
    for rewards in REWARDS.values():
      for on_policy in (False, True):
        found = measure(method, rewards, on_policy=on_policy)
        cells.append(f'{found.mean():.3f} ({found.min():.3f} to {found.max():.3f})')
    lines.append(f'| {name} | {" | ".join(cells)} |')
  values = [f'{reference @ rewards:.3f}' for rewards in REWARDS.values()]
  lines.append(f'| the data itself | {values[0]} | | {values[1]} | |')
  sizes = dict(arms=ARMS, rounds=ROUNDS, groups=GROUPS, samples=SAMPLES, steps=STEPS)
  page = PAGE.format(table='\n'.join(lines), **sizes)
  (DOCS / 'on_policy.md').write_text(page)


if __name__ == '__main__':
  main()
