"""What each divergence of distillation converges to, exactly, in a student that is too small.

    python -m benchmarks.distillation     # writes docs/distillation.md and docs/distillation.png

The teacher is a distribution over 41 tokens with two separate modes, at -2 and 2 with standard deviation
0.5 and masses 0.6 and 0.4; token i is the point x_i between -5 and 5. The student has two parameters:
it is the discretised normal distribution of mean m and standard deviation s, so it cannot be the
teacher. Each divergence is minimised over both by BFGS in float64 from 12 starting points, and the best
is kept. A student with a logit for every token reaches the teacher under all of them.

The second table is of weighted likelihoods and of their mixtures with a reward: a policy over three
tokens with free logits, which the data have with frequencies 0.6, 0.3 and 0.1, and of which only the
last one is rewarded. It is gradient descent on the expected loss.

The third table varies lambda, the fraction of GKD's training text that the student sampled. Teacher and
student write three tokens out of three. The teacher has a logit for every token after every prefix, 2
times a standard normal number; the student sees only the last token. So what it learns after a token
depends on how often its prefixes occur in the text. All sequences are enumerated. No gradient flows
through who wrote them, so the table has points at rest of the mean step, not minima.
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from polgrad.losses import divergences, penalties, surrogates, weights
from polgrad.tabular import enumerable

POINTS = np.linspace(-5, 5, 41)
MODES = ((-2.0, 0.6), (2.0, 0.4))
WIDTH = 0.5
STARTS = [(m, s) for m in (-2.5, 0.1, 2.5) for s in (0.3, 0.7, 1.5, 3.0)]
PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'distillation.md'
K = 8  # likeliest tokens that the teacher tells


def listed(teacher_logits: jax.Array, logits: jax.Array) -> jax.Array:
  """`divergences.listed` of the K tokens that a service would tell."""
  log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher_logits), K)
  return divergences.listed(ids, log_probs, logits)


DIVERGENCES = {
  '`forward_kl`': divergences.forward_kl,
  '`skew_forward_kl`, 0.1': divergences.skew_forward_kl,
  '`jensen_shannon`, w = 0.1': functools.partial(divergences.jensen_shannon, teacher_weight=0.1),
  '`jensen_shannon`, w = 0.5': divergences.jensen_shannon,
  '`jensen_shannon`, w = 0.9': functools.partial(divergences.jensen_shannon, teacher_weight=0.9),
  '`alpha_divergence`, 0.5': divergences.alpha_divergence,
  '`alpha_divergence`, 2, half of chi-square': functools.partial(
    divergences.alpha_divergence, alpha=2.0
  ),
  '`symmetric_kl`, c = 0.5': divergences.symmetric_kl,
  '`symmetric_kl`, c = 0.9': functools.partial(divergences.symmetric_kl, reverse_weight=0.9),
  '`total_variation`': divergences.total_variation,
  '`skew_reverse_kl`, 0.1': divergences.skew_reverse_kl,
  '`reverse_kl`': divergences.reverse_kl,
  "`top_k`, the teacher's 8": functools.partial(divergences.top_k, k=K),
  '`listed`, 8': listed,
  "`top_k`, the teacher's 8, no bucket": functools.partial(divergences.top_k, k=K, bucket=False),
  "`top_k`, the teacher's 8, `reverse_kl`": functools.partial(
    divergences.top_k, divergence=divergences.reverse_kl, k=K
  ),
}


class Found(NamedTuple):
  """The best student of a divergence."""

  mean: float
  deviation: float
  value: float  # of the divergence
  left: float  # probability of the tokens below 0, where the teacher has 0.6
  between: float  # probability of the tokens within 1 of 0, where the teacher has almost none


def teacher() -> np.ndarray:
  """Logits of the teacher, f64[V]."""
  parts = [np.log(w) - 0.5 * ((POINTS - m) / WIDTH) ** 2 for m, w in MODES]
  return np.logaddexp(*parts)


def student(parameters: jax.Array) -> jax.Array:
  """Logits of the student with (mean, log of the standard deviation)."""
  return -0.5 * jnp.square((POINTS - parameters[0]) * jnp.exp(-parameters[1]))


def fixed_point(divergence) -> Found:
  """The minimum over the student's parameters."""
  loss = jax.jit(jax.value_and_grad(lambda p: divergence(jnp.asarray(teacher()), student(p))))
  value = lambda p: tuple(np.asarray(x, float) for x in loss(jnp.asarray(p)))
  found = [
    scipy.optimize.minimize(value, (m, np.log(s)), jac=True, method='BFGS') for m, s in STARTS
  ]
  best = min((one for one in found if np.isfinite(one.fun)), key=lambda one: one.fun)
  p = probabilities(best.x)
  return Found(
    float(best.x[0]),
    float(np.exp(best.x[1])),
    float(best.fun),
    float(p[POINTS < 0].sum()),
    float(p[np.abs(POINTS) < 1].sum()),
  )


def probabilities(parameters: np.ndarray) -> np.ndarray:
  return np.asarray(jax.nn.softmax(student(jnp.asarray(parameters))))


def free(divergence, steps: int = 20_000) -> float:
  """The largest error of a probability of a student with free logits after gradient descent."""
  target = jnp.asarray(teacher()[::8])  # few tokens, so that descent converges
  step = jax.grad(lambda z: divergence(target, z))
  descend = lambda _, z: z - 2.0 * step(z)
  z = jax.jit(lambda z: jax.lax.fori_loop(0, steps, descend, z))(jnp.zeros(len(target)))
  return float(jnp.max(jnp.abs(jax.nn.softmax(z) - jax.nn.softmax(target))))


def rows() -> dict[str, Found]:
  """All fixed points, by the label of the divergence."""
  with jax.enable_x64(True):
    return {name: fixed_point(divergence) for name, divergence in DIVERGENCES.items()}


def page(found: dict[str, Found]) -> str:
  lines = [
    '| divergence | mean | deviation | value | mass below 0 | mass within 1 of 0 |',
    '|---|---|---|---|---|---|',
  ]
  lines += [
    f'| {name} | {x.mean:.3f} | {x.deviation:.3f} | {x.value:.4f} | {x.left:.3f} | {x.between:.3f} |'
    for name, x in found.items()
  ]
  return '\n'.join(lines)


FREQUENCIES = np.array([0.6, 0.3, 0.1])
REWARDS = np.array([0.0, 0.0, 1.0])


def weighed(weight):
  return lambda logp: weight(logp) * penalties.nll(logp)


# The loss of a token of the data, and mu, its weight; the reward has the weight 1 - mu.
LIKELIHOODS = {
  '`sft`': (penalties.nll, 1.0),
  '`dft`': (weighed(weights.probability), 1.0),
  '`probability`, exponent 1/2': (
    weighed(functools.partial(weights.probability, exponent=0.5)),
    1.0,
  ),
  '`undecided`, of `chord`': (weighed(weights.undecided), 1.0),
  '`luffy`': (lambda logp: surrogates.probability_shaped(logp, jnp.ones_like(logp)), 1.0),
  '`luffy`, shape=power': (
    lambda logp: surrogates.probability_power(logp, jnp.ones_like(logp)),
    1.0,
  ),
  '`chord`, weigh=alike, mu = 0.9': (penalties.nll, 0.9),
  '`chord`, weigh=alike, mu = 0.5': (penalties.nll, 0.5),
  '`chord`, weigh=alike, mu = 0.1': (penalties.nll, 0.1),
  '`chord`, mu = 0.9': (weighed(weights.undecided), 0.9),
  '`chord`, mu = 0.5': (weighed(weights.undecided), 0.5),
}


def rest(loss, mu: float, steps: int = 20_000) -> np.ndarray:
  """Probabilities at which mu E_data[loss] - (1 - mu) E_policy[reward] is at rest, f64[3]."""

  def total(z):
    logp = jax.nn.log_softmax(z)
    return mu * jnp.sum(FREQUENCIES * loss(logp)) - (1 - mu) * jnp.sum(jnp.exp(logp) * REWARDS)

  descend = jax.grad(total)
  run = jax.jit(lambda z: jax.lax.fori_loop(0, steps, lambda _, z: z - 2.0 * descend(z), z))
  return np.asarray(jax.nn.softmax(run(jnp.zeros(3))))


def likelihood_rows() -> dict[str, np.ndarray]:
  """Where each loss of `LIKELIHOODS` leads."""
  with jax.enable_x64(True):
    return {name: rest(*given) for name, given in LIKELIHOODS.items()}


def likelihood_page(found: dict[str, np.ndarray]) -> str:
  lines = ['| loss | first token | second | third, rewarded |', '|---|---|---|---|']
  lines += [f'| {name} | {" | ".join(f"{x:.3f}" for x in p)} |' for name, p in found.items()]
  return '\n'.join(lines)


TEACHER = enumerable.table(3, 3)
# What precedes each prefix's next token: 0 nothing, 1 + the last token.
LAST = np.zeros(13, int)
LAST[TEACHER.prefixes[:, 1:]] = 1 + TEACHER.tokens[:, :-1]
STUDENT = TEACHER._replace(logits=lambda params: params[LAST])
# How often each sequence visits each prefix, f[S, P].
VISITS = np.sum(np.eye(13)[TEACHER.prefixes], axis=1)
FRACTIONS = (0.0, 0.5, 1.0)
MIXED = ('`forward_kl`', '`jensen_shannon`, w = 0.5', '`reverse_kl`')


def wordy_teacher(seed: int = 0) -> np.ndarray:
  """Logits of the teacher of sequences, f64[P, V]."""
  return 2 * np.random.default_rng(seed).normal(size=(13, 3))


def sequence_logp(policy: enumerable.Policy, params: jax.Array) -> jax.Array:
  """Log-probabilities of all sequences, f64[S]."""
  return jnp.sum(enumerable.logp(policy, params), axis=1)


def text_loss(divergence, fraction: jax.Array, params: jax.Array) -> jax.Array:
  """The mean over three tokens of a divergence, on the student's text with probability `fraction`."""
  teacher = jnp.asarray(wordy_teacher())
  own = jax.lax.stop_gradient(jnp.exp(sequence_logp(STUDENT, params)))
  text = fraction * own + (1 - fraction) * jnp.exp(sequence_logp(TEACHER, teacher))
  return text @ VISITS @ divergence(teacher, STUDENT.logits(params)) / 3


def text_rest(divergence, steps: int = 4000) -> dict[float, np.ndarray]:
  """The student at rest, f64[4, 3], by lambda, the fraction of text that it sampled."""
  step = jax.grad(functools.partial(text_loss, divergence), argnums=1)

  @jax.jit
  def run(fraction):
    descend = lambda _, x: x - 2.0 * step(fraction, x)
    return jax.lax.fori_loop(0, steps, descend, jnp.zeros((4, 3)))

  return {fraction: np.asarray(run(fraction)) for fraction in FRACTIONS}


class Text(NamedTuple):
  """KLs of whole sequences between teacher and student at rest, nats."""

  forward: float  # KL(teacher || student)
  reverse: float  # KL(student || teacher)


def text_rows() -> dict[tuple[str, float], Text]:
  """By the label of the divergence and the fraction of the student's text."""
  with jax.enable_x64(True):
    teacher = np.asarray(sequence_logp(TEACHER, jnp.asarray(wordy_teacher())))
    kl = lambda p, q: float(np.exp(p) @ (p - q))
    found = {}
    for name in MIXED:
      for fraction, params in text_rest(DIVERGENCES[name]).items():
        own = np.asarray(sequence_logp(STUDENT, jnp.asarray(params)))
        found[name, fraction] = Text(kl(teacher, own), kl(own, teacher))
    return found


def text_page(found: dict[tuple[str, float], Text]) -> str:
  lines = ['| divergence | fraction of own text | KL(T, S) | KL(S, T) |', '|---|---|---|---|']
  lines += [f'| {n} | {f} | {x.forward:.4f} | {x.reverse:.4f} |' for (n, f), x in found.items()]
  return '\n'.join(lines)


THIRD = '<!-- begin of the texts -->', '<!-- end of the texts -->'
SECOND = '<!-- begin of the likelihoods -->', '<!-- end of the likelihoods -->'
BEGIN, END = '<!-- begin of the table -->', '<!-- end of the table -->'


def draw(found: dict[str, Found], path: pathlib.Path) -> None:
  """One panel for each divergence: the teacher's distribution and the student's."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(4, 4, figsize=(11, 8), sharex=True, sharey=True)
  target = np.asarray(jax.nn.softmax(jnp.asarray(teacher())))
  for axis, (name, x) in zip(axes.flat, found.items()):
    axis.fill_between(POINTS, target, color='0.8', label='teacher')
    p = probabilities(np.array([x.mean, np.log(x.deviation)]))
    axis.plot(POINTS, p, color='tab:blue', label='student')
    axis.set_title(name.replace('`', ''), fontsize=9)
  for axis in axes.flat[len(found) :]:
    axis.axis('off')
  axes.flat[0].legend(fontsize=8)
  figure.supxlabel('token, at its point x')
  figure.supylabel('probability')
  figure.tight_layout()
  figure.savefig(path, dpi=90)


def main() -> None:
  found = rows()
  text = PAGE.read_text()
  tables = (
    (BEGIN, END, page(found)),
    (*SECOND, likelihood_page(likelihood_rows())),
    (*THIRD, text_page(text_rows())),
  )
  for begin, end, table in tables:
    before, others = text.split(begin)
    text = f'{before}{begin}\n{table}\n{end}{others.split(end)[1]}'
  PAGE.write_text(text)
  draw(found, PAGE.with_suffix('.png'))
  print(page(found))


if __name__ == '__main__':
  main()
