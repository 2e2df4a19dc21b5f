"""What a method is: the choices of a paper, apart from the task and the model."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from polgrad import collect as collectors
from polgrad import credit as credits
from polgrad import objectives
from polgrad.arrays import ARRAYS, MODEL, OF_TURNS, VOCABULARY, WIDE, shape_of
from polgrad.models.token_stats import CONTEXT, reads_context, whole_context
from polgrad.registry import UnknownArray, bind, call, inputs, part, suggest
from polgrad.types import Array, Batch, Outputs

# What a method function gets from the run, if it has an argument of that name (`compose.compose`).
BUDGETS = ('max_new_tokens', 'samples_per_prompt', 'candidates', 'steps', 'learning_rate')
BUDGETS += ('supervised_rate',)
# What the records must have, by collector.
NEEDS = {
  collectors.Demonstrations: 'demonstrations',
  collectors.EarlyTargets: 'demonstrations',
  collectors.MixedTargets: 'demonstrations',
  collectors.Preferences: 'pairs',
  collectors.Revisions: 'pairs',
  collectors.UserPreferences: 'pairs',
  collectors.SampledPreferences: 'pairs',
  collectors.Feedback: 'feedback',
  collectors.Lists: 'lists',
}
LIVE = tuple(MODEL)  # what the model says; only these carry a gradient
# Arrays that are not numbers but ids or choices.
DISCRETE = frozenset({
  *('tokens', 'segment_ids', 'prompt_ids', 'group_ids', 'stream', 'sampled_at', 'turn_ids', 'step_ids'),
  *('mask', 'where', 'valid', 'finished', 'selected', 'preferred'),
  *('observation_ids', 'turn_players', 'span_ids', 'early_tokens', 'teacher_top_ids'),
  *('mixed_tokens', 'partner_tokens'),
})  # fmt: skip


def choice(name: str, reads: Mapping[Any, tuple[str, ...]]) -> Callable[[Callable], Callable]:
  """A decorator of a method function: options that only some choices of the option `name` read.

      @choice('shape', {'ratio': ('gamma',), 'power': ('exponent',), 'likelihood': ()})
      def luffy(*, shape='ratio', gamma=0.1, exponent=0.5) -> Method:

  An option that is given beside a choice that does not read it is refused, so that it cannot be ignored
  silently. Options that are in no tuple belong to all choices.

  Args:
    name: of the option that chooses.
    reads: the options that belong to each choice and not to all, by the value of the option.
  """
  some = {option for options in reads.values() for option in options}

  def decorate(function: Callable) -> Callable:
    default = inspect.signature(function).parameters[name].default

    @functools.wraps(function)
    def checked(**knobs):
      chosen = knobs.get(name, default)
      own = reads.get(chosen, some)
      for option in sorted(some.intersection(knobs).difference(own)):
        others = ' or '.join(f'{name}={value!r}' for value in reads if option in reads[value])
        raise ValueError(
          f'{function.__name__}: {option} is only read with {others}, but {name}={chosen!r}, which '
          f'reads {sorted(own) or "no option beside those of all choices"}'
        )
      return function(**knobs)

    return checked

  return decorate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """The choices of a paper as parts (see `polgrad.registry`), which can be read and changed.

      method = methods.dapo(max_new_tokens=256)
      method.objective.surrogate.eps_high = 0.3
      loss, metrics = method.loss(logp=..., behavior_logp=..., rewards=..., mask=..., group_ids=...)

  Attributes:
    objective: the loss, a part of `polgrad.objectives`.
    credit: rewards to advantages, returns or labels, a part of `polgrad.credit`.
    collect: the collector (a class of `polgrad.collect`) with what the method asks of it. All other
      settings, such as the number of prompts, come from the task.
    curriculum: which records a step draws, a part of `polgrad.curricula`; None draws shuffled epochs.
    source: what the source of the task's records is wrapped in, a function of `data.sources` with an
      argument `source`. If it has an argument `more`, it gets the records that are trained on beside
      held-out ones. Its arguments that are parts are sources too, and become chats like the task's
      records. None: nothing.
    rewards: verifiers that the method adds to those of the task, each with its weight. Dynamic sampling
      does not compare them: it compares groups by the task's verifiers alone.
    reward_scale: multiplies the weights of the task's verifiers.
    combine: how terms of the reward become one number; None is their weighted sum.
    anchors: parameter sets beside the policy (reference, teacher, ...) and their refresh rules.
    learned: anchors that learn by their own loss, each a part of `learner.Learned`.
    networks: networks that score hidden states and learn by their own loss, each a part of
      `learner.OnlineNetwork`.
    further: further updates of the policy, by the name of the batch that the collector makes for them,
      each a part of `learner.Learned`.
    optimizer: a part of `polgrad.optim`; None is AdamW.
    learning_rate: multiplies the learning rate of the model's preset, if `optimizer` is None.
    learns: which learning rate of the preset is meant: 'reinforce', 'preference' or 'imitate'. Empty
      means the usual one of the collector.
    epochs: passes over a collected batch.
    minibatches: updates in each pass.
    restart: initialise the policy again after the anchors were copied from it (distillation).
    warm_start: whether a model that was not pretrained learns the task's demonstrations first.
    before: methods of phases that come before this one, by the names of the phases, such as one that
      trains the critic alone.
    steps: number of batches to collect; 0 is that of the run.
    plateau, plateau_metric: when the phase ends earlier, see `build.Phase`.
  """

  objective: ConfigDict
  credit: ConfigDict = dataclasses.field(default_factory=lambda: part(credits.nothing))
  collect: functools.partial = dataclasses.field(
    default_factory=lambda: functools.partial(collectors.Rollouts)
  )
  curriculum: ConfigDict | None = None
  source: functools.partial | None = None
  rewards: Mapping[str, ConfigDict] = dataclasses.field(default_factory=dict)
  reward_scale: float = 1.0
  combine: ConfigDict | None = None
  anchors: Mapping[str, ConfigDict] = dataclasses.field(default_factory=dict)
  learned: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  networks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  further: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  optimizer: ConfigDict | None = None
  learning_rate: float = 1.0
  learns: str = ''
  epochs: int = 1
  minibatches: int = 1
  restart: bool = False
  warm_start: bool = True
  before: Mapping[str, 'Method'] = dataclasses.field(default_factory=dict)
  steps: int = 0
  plateau: int = 0
  plateau_metric: str = 'reward'

  @property
  def needs(self) -> str:
    """What the data must have: 'problems' to sample from, or completions, see `NEEDS`."""
    if self.collect.keywords.get('preferences'):  # a group of samples beside a pair of the data
      return 'pairs'
    return NEEDS.get(self.collect.func, 'problems')

  @property
  def reads(self) -> frozenset[str]:
    """Names of the arrays that `loss` needs, besides `mask`."""
    credit, objective = self.bound()
    return _reads(credit, objective)

  def bound(self) -> tuple[credits.Estimator, objectives.Objective]:
    """Credit and objective as functions of arrays."""
    credit = bind(self.credit, credits.TABLE, 'method.credit')
    return credit, bind(self.objective, objectives.TABLE, 'method.objective')

  def loss(self, *, mask: Array, step: Array | int = 0, **arrays: Array) -> tuple[Array, dict]:
    """The loss f32[] of a batch, and metrics. Its gradient is that by logp, entropy, values, logits.

    Rewards become advantages as the method says. What credit would make (`advantages`, `returns`,
    `label`) may be given instead of rewards. `proximal_logp` is `behavior_logp` unless it is given.
    State that a method keeps between updates starts anew in each call; `bound()` gives the functions
    for a loop that carries it.

    Args:
      mask: bool[B, T], tokens that the policy made; integers 0 and 1 are taken as well.
      step: number of the update; schedules read it.
      arrays: by name, see `reads`; shapes are those of `polgrad/arrays.py`, and advantages and returns
        may be [B] too. Arrays that other methods read are ignored.

    Raises:
      UnknownArray: an array that the method reads is missing, or a name that no method reads.
      ValueError: an array of another shape.
    """
    credit, objective = self.bound()
    mask = _mask(mask)
    arrays = _checked(credit, objective, _shaped(arrays, mask.shape))
    tokens = arrays.get('tokens', jnp.zeros(mask.shape, jnp.int32))
    live = {name: arrays.pop(name, None) for name in LIVE}
    known = {'tokens': tokens, **arrays}
    known |= {name: arrays[name].reshape(*mask.shape, -1) for name in WIDE & arrays.keys()}
    if reads_context(objective.stats):
      known |= whole_context(tokens, mask.astype(jnp.int32), mask)
    stats = {name: call(stat, known) for name, stat in objective.stats.items()}
    # Credit comes first. What it makes is data, so no gradient flows through it.
    batch = Batch(tokens=tokens, segment_ids=mask.astype(jnp.int32), mask=mask).with_arrays(
      **{name: x for name, x in arrays.items() if name not in VOCABULARY}
    )
    if not _made(credit) <= arrays.keys():
      batch, _ = credits.assign(credit, batch, credit.init())
    terms, metrics = objective.apply(
      Outputs(stats=stats, **live), batch, objective.init(), step=step
    )
    loss = sum(t.value() for name, t in terms.items() if name not in objective.probes)
    return loss, {name: metric.value() for name, metric in metrics.items()}


def _made(credit: credits.Estimator) -> frozenset[str]:
  """What credit makes of the rewards, apart from the mask."""
  return credit.provides - {'mask'}


def _reads(credit: credits.Estimator, objective: objectives.Objective) -> frozenset[str]:
  of_credit = credit.requires | (credit.scored if _made(credit) else set())
  of_groups = {n for f in objective.slots.values() for n in inputs(f)} & {'group_ids'}
  of_vocabulary = {n for f in objective.stats.values() for n in inputs(f)} & VOCABULARY.keys()
  of_vocabulary = {'tokens' if n in CONTEXT else n for n in of_vocabulary}
  in_slots = {n for f in objective.slots.values() for n in inputs(f)}
  of_head = objective.head.requires - in_slots  # `loss` gets what the head gives, not what it reads
  fields = objective.requires - {'teacher_logits'} - objective.stats.keys() - of_head
  return frozenset({'logp'} | (fields - _made(credit)) | of_credit | of_vocabulary | of_groups)


def _mask(mask: Array) -> Array:
  mask = jnp.asarray(mask)
  if mask.ndim != 2 or not mask.size:
    raise ValueError(
      f'mask has shape {mask.shape}; expected [B, T] with at least one row and token'
    )
  if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
    raise ValueError(f'mask is {mask.dtype}; expected bool, for example mask > 0')
  return mask.astype(bool)


def _shaped(arrays: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Array]:
  """The arrays that are given, numbers as floats; `shape` is that of the mask.

  Raises:
    ValueError: an array of another shape than `ARRAYS` says.
  """
  rows, _ = shape
  sizes = {'B T': shape, 'B': (rows,), '': (), 'B n': (rows, None), 'B G': (rows, None), '2': (2,)}
  sizes |= {'B Tk': (rows, None), 'B K': (rows, None)}  # None: any size
  sizes |= {'... V': (*shape, None), '... D': (*shape, None)}
  arrays = {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}
  for name, x in arrays.items():
    if name in ('advantages', 'returns') and x.shape == (rows,):
      x = jnp.broadcast_to(x[:, None], shape)
    spec = shape_of(name)
    wanted = sizes.get(spec, x.shape)
    if len(x.shape) != len(wanted) or any(n not in (m, None) for n, m in zip(wanted, x.shape)):
      raise ValueError(
        f'{name} has shape {x.shape}; expected [{spec.replace(" ", ", ")}], where [B, T] is the shape '
        f'{shape} of mask'
      )
    discrete = name in DISCRETE or jnp.issubdtype(x.dtype, jnp.floating)
    arrays[name] = x if discrete else x.astype(jnp.float32)
  return arrays


def _checked(
  credit: credits.Estimator, objective: objectives.Objective, arrays: Mapping[str, Array]
) -> dict[str, Array]:
  """The arrays that the method reads, with defaults, or an error that says which ones it reads."""
  wanted = _reads(credit, objective)
  known = wanted | _made(credit) | {'tokens', 'valid', 'behavior_logp', 'entropy', 'group_ids'}
  known |= {*OF_TURNS}
  for name in sorted(arrays.keys() - known - ARRAYS.keys()):
    raise UnknownArray(f'no method reads {name!r}{suggest(name, known)}')
  arrays = {name: x for name, x in arrays.items() if name in known}
  if 'behavior_logp' in arrays:
    arrays.setdefault('proximal_logp', arrays['behavior_logp'])
  if _made(credit) and _made(credit) <= arrays.keys():
    wanted -= credit.requires | credit.scored - objective.requires
  missing = sorted(wanted - arrays.keys())
  if missing:
    either = ' (or behavior_logp in its place)' if 'proximal_logp' in missing else ''
    raise UnknownArray(f'{missing} missing{either}: this method reads mask and {sorted(wanted)}')
  if _made(credit):
    arrays.setdefault('valid', jnp.ones(len(arrays['logp']), bool))
  return arrays
