"""Traces an update with the shapes that its arrays will have: nothing is computed and nothing compiled,
except for the credit of groups of one row.

Errors that otherwise appear when the first step is traced are found here: a metric that no objective
has, knobs that contradict each other, arrays of shapes that do not fit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polgrad import credit as credits
from polgrad import teachers
from polgrad.arrays import ARRAYS, WIDE, shape_of
from polgrad.models.policy import Policy, learned
from polgrad.registry import call
from polgrad.types import FIELDS, Batch, Outputs, TrainState

INTEGERS = ('tokens', 'segment_ids', 'prompt_ids', 'group_ids', 'stream', 'sampled_at')
INTEGERS += ('observation_ids', 'turn_players', 'turn_ids', 'step_ids', 'span_ids', 'early_tokens')
INTEGERS += ('teacher_top_ids',)
INTEGERS += ('mixed_tokens', 'partner_tokens')
BOOLEANS = ('mask', 'finished', 'valid')
ALL = ('tokens', 'segment_ids', 'mask')  # of every batch


def batch_shapes(phase: Any, rows: int) -> Batch:
  """The arrays of a batch of a phase with `rows` rows, as shapes, after credit was given."""
  collector = phase.collect
  wanted = phase.objective.requires | phase.credit.requires
  anchors = {f'{name}_logp' for name in phase.anchors} & wanted
  outside = {
    f'{name}_{array}': entries
    for name, model in phase.elsewhere.items()
    for array, entries in teachers.entries_asked(name, model, wanted).items()
  }
  names = {
    *ALL,
    *collector.provides,
    *phase.curriculum.provides,
    *anchors,
    *outside,
    *({'old_values'} & wanted),
    *(f'{name}_scores' for name in phase.networks),
    *(f'{name}_head_score' for name in phase.anchors if f'{name}_head_score' in wanted),
  }
  # Labels of single rows have no groups.
  if 'rewards' in names or ('label' in names and collector.rows_per_prompt > 1):
    names.add('group_ids')
  sizes = {'B T': (rows, collector.length), 'B': (rows,), '': (), '2': (2,)}
  sizes['B n'] = (rows, getattr(collector, 'baseline_samples', 0))
  sizes['B G'] = (rows, collector.rows_per_prompt)
  sizes['B Tk'] = (rows, collector.length * getattr(collector, 'top', 1))

  def shape(name):
    kind = jnp.int32 if name in INTEGERS else jnp.bool_ if name in BOOLEANS else jnp.float32
    spec = shape_of(name)
    spec = 'B T' if spec == '...' and name not in ARRAYS else spec  # a statistic
    if spec == 'B Tk' and name in outside:
      return jax.ShapeDtypeStruct((rows, collector.length * outside[name]), kind)
    return jax.ShapeDtypeStruct(sizes[spec], kind)

  arrays = {name: shape(name) for name in names}
  batch = Batch(
    **{name: x for name, x in arrays.items() if name in FIELDS},
    features={name: x for name, x in arrays.items() if name not in FIELDS},
  )
  if 'rewards' not in names:  # of the data; nothing is credited
    return batch
  contrasts = phase.credit.contrasts
  if contrasts is not None:
    number = len(jax.eval_shape(contrasts.make, batch))
    batch = batch.with_arrays(influences=jax.ShapeDtypeStruct((rows, number), jnp.float32))
  assign = lambda batch, state: credits.assign(phase.credit, batch, state)[0]
  return jax.eval_shape(assign, batch, phase.credit.init())


def lone_advantages_are_zero(credit: credits.Estimator) -> bool:
  """Whether rows that are each alone in their group get advantages of 0, whatever their rewards.

  Computed for six rows of two tokens. False for an estimator that reads arrays of other shapes, or makes
  no advantages.
  """
  names = {*ALL, 'rewards', 'valid', 'group_ids', *credit.requires, *credit.scored}
  sizes = {'B T': (6, 2), 'B': (6,), '': ()}
  if 'advantages' not in credit.provides or {shape_of(name) for name in names} - sizes.keys():
    return False
  random = np.random.default_rng(0)

  def array(name):
    shape = sizes[shape_of(name)]
    if name in INTEGERS:
      return np.zeros(shape, np.int32)
    return np.ones(shape, bool) if name in BOOLEANS else random.random(shape, np.float32)

  found = {name: array(name) for name in names} | {'group_ids': np.arange(6, dtype=np.int32)}
  batch = Batch(
    **{name: x for name, x in found.items() if name in FIELDS},
    features={name: x for name, x in found.items() if name not in FIELDS},
  )
  credited, _ = jax.jit(lambda batch: credits.assign(credit, batch, credit.init()))(batch)
  return not np.any(credited.advantages)


def trace_networks(path: str, phase: Any, policy: Policy) -> None:
  """Traces the scores and losses of the networks of a phase, without the model.

  Raises:
    ValueError: names the network and what is wrong.
  """
  for name, one in phase.network_learners(policy).items():
    with _Naming(f'{path}.networks.{name}'):
      batch, config = batch_shapes(phase, phase.collect.rows), one.policy.config
      count = len(one.network.layers)
      states = jax.ShapeDtypeStruct((count, *batch.tokens.shape, config.width), jnp.float32)
      for function in (one.network.errors, one.network.scores):
        found = jax.eval_shape(function, one.shapes(), states, batch)
        if found.shape != batch.tokens.shape:
          raise ValueError(f'it gives {found.shape} numbers for tokens {batch.tokens.shape}')


class Traced(NamedTuple):
  """Names of what an objective computes."""

  terms: tuple[str, ...]  # of the loss
  metrics: tuple[str, ...]


def trace_objective(path: str, phase: Any, policy: Policy) -> Traced:
  """Traces credit and objective of a phase, without the model.

  Raises:
    ValueError: names the section and what is wrong.
  """
  objective, found = phase.objective, []

  def update(outputs, batch, state):
    terms, metrics = objective.apply(outputs, batch, state, step=jnp.zeros((), jnp.int32))
    found.append(
      Traced(tuple(name for name in terms if name not in objective.probes), tuple(metrics))
    )
    return objective.advance(state, metrics)

  with _Naming(path):
    batch = batch_shapes(phase, phase.collect.rows // phase.minibatches)
    numbers = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32)
    outputs = Outputs(
      logp=numbers,
      entropy=numbers,
      values=numbers if 'values' in objective.requires else None,
      values_after=numbers if 'values_after' in objective.requires else None,
      stats={name: _statistic(fn, policy, numbers) for name, fn in objective.stats.items()},
      **dict.fromkeys(objective.head.makes, jax.ShapeDtypeStruct(numbers.shape[:1], jnp.float32)),
    )
    jax.eval_shape(update, outputs, batch, objective.init())
  return found[0]


def _statistic(fn: Any, policy: Policy, numbers: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Traces a statistic of the logits on a few tokens; it gives a number for each."""
  logits = jax.ShapeDtypeStruct((3, policy.config.vocab_size), jnp.float32)
  arrays = {
    'logits': logits,
    'teacher_logits': logits,
    'tokens': jax.ShapeDtypeStruct((3,), jnp.int32),
    'hidden': jax.ShapeDtypeStruct((3, 8), jnp.float32),
    'context': jax.ShapeDtypeStruct((3, numbers.shape[1]), jnp.int32),
    'context_mask': jax.ShapeDtypeStruct((3, numbers.shape[1]), jnp.bool_),
  }
  kind = lambda name: jnp.int32 if name in INTEGERS else jnp.float32
  arrays |= {name: jax.ShapeDtypeStruct((3, 2), kind(name)) for name in WIDE}
  found = jax.eval_shape(lambda arrays: call(fn, arrays), arrays)
  if found.shape != (3,):
    raise ValueError(f'a statistic gives {found.shape[1:]} numbers for a token instead of one')
  return numbers


def state_shapes(phase: Any, policy: Policy) -> TrainState:
  """The state at the start of a phase, as shapes."""
  trainable = learned(policy, policy.shapes())
  number = jax.ShapeDtypeStruct((), jnp.int32)
  anchors = {n: phase.frozen[n].shapes() if n in phase.frozen else trainable for n in phase.anchors}
  init = lambda optimizer, params: jax.eval_shape(optimizer.init, params)
  learners = phase.anchor_learners(policy)
  networks = phase.network_learners(policy)
  return TrainState(
    **dict.fromkeys(('step', 'phase', 'phase_step', 'update', 'cursor', 'skipped'), number),
    params=policy.shapes(),
    opt_state=jax.eval_shape(phase.optimizer.init, trainable),
    anchors=anchors,
    learned={name: one.init(anchors[name], init) for name, one in learners.items()}
    | {name: one.init(trainable, init) for name, one in phase.further_learners(policy).items()},
    networks={name: one.init(one.shapes(), init) for name, one in networks.items()},
    collect_state=phase.collect.init(),
    credit_state=phase.credit.init(),
    objective_state=phase.objective.init(),
    curriculum_state=phase.curriculum.init(phase.source),
  )


def trace_update(path: str, phase: Any, policy: Policy, mesh: jax.sharding.Mesh) -> None:
  """Traces the whole update of a phase, `Learner.update`, which takes seconds for a deep model.

  Raises:
    ValueError: names the section and what is wrong.
  """
  with _Naming(path), jax.set_mesh(mesh):
    batch = batch_shapes(phase, phase.collect.rows // phase.minibatches)
    batch = batch.replace(layout=phase.layout._replace(pack=0))
    jax.eval_shape(phase.learner(policy).update, state_shapes(phase, policy), batch)
    for one in (*phase.anchor_learners(policy).values(), *phase.network_learners(policy).values()):
      jax.eval_shape(one.update, state_shapes(phase, policy), batch)


class _Naming:
  """Turns whatever a trace raises into a ValueError that names the section."""

  def __init__(self, path: str):
    self.path = path

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, Exception):
      said = str(error) if isinstance(error, ValueError) else f'{kind.__name__}: {error}'
      raise ValueError(f'{self.path}: the update cannot be traced: {said}') from error
