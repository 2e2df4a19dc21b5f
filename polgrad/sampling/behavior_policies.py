"""Behavior policies: functions from logits to the logits that completions are drawn from.

Each positional argument holds the logits f32[..., V] of one parameter set, and the argument's name
says which one: `policy` is the model in training, any other name is an anchor, such as `reference`.
The sampler keeps one key-value cache for each parameter set. The result is f32[..., V]; a token with
logit -inf is never drawn. `batches` f32[] is no parameter set but the number of batches that the phase
has collected before, so that a behavior policy may change over a run.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from polgrad.registry import AtLeastOne, Fraction, NotNegative, Range, inputs, table
from polgrad.sampling import processors

Array = jax.Array
NUMBERS = frozenset({'batches'})  # what behavior policies may read besides logits


def models_read(behavior_policy: Callable[..., Array]) -> tuple[str, ...]:
  """The names of the parameter sets that a behavior policy reads."""
  return tuple(name for name in inputs(behavior_policy) if name not in NUMBERS)


def current(policy: Array) -> Array:
  """The policy, unchanged."""
  return policy


def greedy(policy: Array) -> Array:
  """Probability 1 on the most likely token; of equally likely ones, on the first."""
  best = jnp.argmax(policy, axis=-1, keepdims=True)
  return jnp.where(jax.nn.one_hot(best[..., 0], policy.shape[-1], dtype=bool), 0.0, -jnp.inf)


def reference(reference: Array) -> Array:
  """The reference policy, unchanged; the policy in training is not evaluated."""
  return reference


def opponent(opponent: Array) -> Array:
  """The anchor `opponent`, unchanged, such as an average of past policies."""
  return opponent


def previous(previous: Array) -> Array:
  """The anchor `previous`, unchanged: the policy at the start of an iteration."""
  return previous


def teacher(teacher: Array) -> Array:
  """The anchor `teacher`, unchanged; the policy in training is not evaluated."""
  return teacher


def controlled(reference: Array, scorer: Array, *, strength: float = 1.0) -> Array:
  """log pi(z) = log reference(z) + strength * V([prefix, z]) + const: controlled decoding.

  arXiv:2310.17022, token by token. The scorer's logits are the values of prefixes, as the methods
  `cd_fudge` and `cd_q` train them. The policy maximises strength * E[V] - KL(pi, reference) of the next
  token. With exact values this is not quite the best trade for whole sequences: that would need soft
  values, log E[exp(strength V)] / strength. For several scorers see `controlled_by`.

  Args:
    reference: logits f32[..., V].
    scorer: values f32[..., V], in units of the reward.
    strength: in 1 / unit of the reward; 0 is the reference, and a large one takes the best value.

  Returns:
    log-probabilities f32[..., V].
  """
  return jax.nn.log_softmax(reference + strength * scorer)


def controlled_by(strengths: Mapping[str, float], *, base: str = 'reference') -> Callable:
  """`controlled` by several scorers, each with its own strength: their values are summed.

  Args:
    strengths: by the names of the scorers' parameter sets.
    base: name of the parameter set that is controlled.

  Returns:
    A behavior policy that reads the logits of `base` and of every scorer.
  """

  def controlled(*logits):
    terms = zip(strengths.values(), logits[1:], strict=True)
    return jax.nn.log_softmax(logits[0] + sum(strength * values for strength, values in terms))

  # The names of the arguments say which parameter sets a behavior policy reads.
  kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
  names = (base, *strengths)
  controlled.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])
  return controlled


def geometric_mixture(policy: Array, reference: Array, *, reference_weight: float = 0.5) -> Array:
  """Normalised policy^(1 - w) * reference^w, token by token (Nash-MD, arXiv:2312.00886).

  Args:
    policy: logits f32[..., V] of the policy.
    reference: logits f32[..., V] of the reference.
    reference_weight: w in [0, 1]: 0 is the policy, 1 the reference.

  Returns:
    log-probabilities f32[..., V].
  """
  w = reference_weight
  log_policy, log_reference = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)
  return jax.nn.log_softmax((1 - w) * log_policy + w * log_reference)


def teacher_mixture(policy: Array, teacher: Array, *, teacher_weight: Fraction = 0.2) -> Array:
  """(1 - w) policy + w teacher, of probabilities, token by token (MiniLLM, arXiv:2306.08543).

  Some tokens come from the teacher, so samples are better than the student's alone, and a student that
  is rewarded by the teacher's probabilities finds it harder to exploit their errors.

  Args:
    policy: logits f32[..., V] of the student.
    teacher: logits f32[..., V] of the teacher.
    teacher_weight: w in [0, 1]: 0 is the policy, 1 the teacher.

  Returns:
    log-probabilities f32[..., V].
  """
  student, other = jax.nn.log_softmax(policy), jax.nn.log_softmax(teacher)
  return jnp.logaddexp(student + jnp.log1p(-teacher_weight), other + jnp.log(teacher_weight))


def expert_contrast(
  reference: Array,
  expert: Array,
  antiexpert: Array,
  *,
  strength: float = 0.4,
  top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0,
) -> Array:
  """reference (expert / antiexpert)^strength, normalised, token by token: DExperts (arXiv:2105.03023).

  STEER (arXiv:2311.07167) samples its data like this, from models of the style that is wanted and of the
  one that is not. Strength 0 is the reference, and with the reference as antiexpert this is
  reference^(1 - strength) expert^strength.

  Args:
    reference: logits f32[..., V] of the base model.
    expert: logits f32[..., V].
    antiexpert: logits f32[..., V].
    strength: alpha of the paper.
    top_p: probability of the most likely tokens of the reference; the others are never drawn.

  Returns:
    log-probabilities f32[..., V].
  """
  kept = processors.top_p(reference, p=top_p) if top_p < 1 else reference
  difference = jax.nn.log_softmax(expert) - jax.nn.log_softmax(antiexpert)
  return jax.nn.log_softmax(jnp.where(kept > -jnp.inf, kept + strength * difference, -jnp.inf))


def fading_contrast(
  policy: Array,
  expert: Array,
  antiexpert: Array,
  batches: Array,
  *,
  strength: float = 0.4,
  top_p: Annotated[float, Range(above=0, at_most=1)] = 0.9,
  every: AtLeastOne = 2000,
  power: NotNegative = 0.25,
) -> Array:
  """`expert_contrast` around the policy, whose strength falls: the second stage of STEER
  (arXiv:2311.07167).

      policy (expert / antiexpert)^alpha,   alpha = strength (1 + floor(batches / every))^-power

  Args:
    policy: logits f32[..., V] of the policy.
    expert: logits f32[..., V].
    antiexpert: logits f32[..., V].
    batches: f32[], batches collected before.
    strength: alpha of the first batches.
    top_p: probability of the most likely tokens of the policy; the others are never drawn.
    every: batches of equal strength.
    power: 0 keeps the strength.

  Returns:
    log-probabilities f32[..., V].
  """
  alpha = strength * (1 + batches // every) ** -power
  return expert_contrast(policy, expert, antiexpert, strength=alpha, top_p=top_p)


TABLE = table(
  'behavior_policies',
  *(current, greedy, reference, opponent, previous, teacher, controlled),
  *(geometric_mixture, teacher_mixture, expert_contrast, fading_contrast),
)
Part = Annotated[Callable, TABLE]
