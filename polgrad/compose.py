"""Joins a method, a task and a model into one complete configuration.

    compose(methods.dapo, tasks.chain_sum(), presets.smollm2(path='~/smollm2'))
    from_text('method=dapo,task=chain_sum,model=smollm2,path=~/smollm2,steps=30')

The result is what `polgrad.build` reads; every value in it can still be changed, in Python or with
`--config.phases.train...` on the command line. The phase of the method is called `train`. A model that
was not pretrained first learns the task's demonstrations, in a phase called `warm_start`. A method may
ask for other phases before its own (`Method.before`).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict

from polgrad import build, collect, curricula, learner, methods, models, optim, tasks, teachers
from polgrad import trackers as tracking
from polgrad.data import sources
from polgrad.losses import divergences
from polgrad.methods import Method
from polgrad.presets import Preset
from polgrad.registry import (
  Count,
  Decay,
  NotNegative,
  Range,
  bind,
  check_ranges,
  find,
  knobs_of,
  part,
  table,
  weighted,
)
from polgrad.reward_models import REWARDS
from polgrad.tasks import Task

SMOKE = dict(
  steps=2,
  prompts=4,
  samples_per_prompt=4,
  demonstration_rows=4,
  pairs=4,
  lists=4,
  held_out=8,
  first=2,
)


def compose(
  method: Method | Callable[..., Method],
  task: Task,
  model: Preset,
  *,
  steps: Count = 0,
  warm_start: Annotated[int, Range(at_least=-1)] = -1,
  learning_rate: NotNegative = 0.0,
  prompts: Count = 0,
  teacher: str = '',
  teacher_devices: Count = 0,
  teacher_url: str = '',
  seed: Count = 0,
  smoke: bool = False,
  trackers: str = '',
  average: Decay = 0.0,
  curriculum: ConfigDict | None = None,
) -> ConfigDict:
  """A complete run of a method on a task with a model.

  Args:
    method: a `Method`, or a function that makes one; arguments of the function that are in
      `methods.base.BUDGETS` are taken from the task and the run.
    steps: batches to collect; 0 is the task's number.
    warm_start: supervised steps before the method begins; -1 is the number of the preset, 0 is none.
    learning_rate: of AdamW; 0 is that of the preset for what the method learns.
    prompts: prompts of a batch of rollouts; 0 is the task's rows / samples per prompt.
    teacher: Hugging Face folder of the anchor `teacher`, for distillation from another model.
    teacher_devices: how many of the last devices, outside of the run's mesh, hold the teacher; 0: it is
      on the devices of the run.
    teacher_url: of a service that gives the log-probs of the model `teacher`, up to `/v1`. Divergences
      from the teacher are then those of the tokens that the service lists, see `divergences.listed`.
    seed: of parameters, data order and sampling.
    smoke: two steps of small batches on one device (with a smaller model, if it is `tiny`).
    trackers: where metrics go besides metrics.jsonl, with + between several: `wandb+tensorboard`; 'none'
      is nowhere, and '' is TensorBoard, except in a smoke run.
    average: decay of a running mean of the policy over the updates of `train`, such as 0.999; it is the
      anchor `average`, which is measured beside the policy. 0 is none.
    curriculum: which records a step draws, a part of `polgrad.curricula`; None is the method's choice.

  Raises:
    ValueError: the task lacks what the method needs, or the method cannot use what is asked for.
  """
  numbers = dict(steps=steps, warm_start=warm_start, learning_rate=learning_rate, prompts=prompts)
  check_ranges(compose, numbers | {'seed': seed, 'average': average})
  run = _Run(task, model, steps or task.steps, learning_rate, prompts, smoke)
  if not isinstance(method, Method):
    method = run.make(method)
  if curriculum is not None:
    method = dataclasses.replace(method, curriculum=curriculum)
  warm_start = model.warm_start if warm_start < 0 else warm_start
  if not method.warm_start:
    warm_start = 0
  _check_fit(method, task, warm_start)
  distils = method.restart and method.warm_start and 'teacher' in method.anchors
  if distils and not (warm_start or teacher or method.before):
    raise ValueError(
      'the method distils a teacher: name its folder with teacher=FOLDER, or use warm_start=STEPS to '
      'train one first'
    )
  earlier = {name: run.phase(one) for name, one in method.before.items()}
  phases = {**earlier, 'train': run.phase(method, teacher=teacher)}
  if teacher_devices or teacher_url:
    _move_teacher(phases['train'], teacher, teacher_devices, teacher_url)
  evaluation = run.evaluation(method)
  if average:
    phases['train'].anchors.average = part(optim.ema, decay=average)
    if 'anchors' in evaluation:
      evaluation.anchors = ('average',)
  if warm_start:
    first = dataclasses.replace(run, steps=2 if smoke else warm_start, learning_rate=0.0)
    phases = {'warm_start': first.phase(methods.sft()), **phases}
  return part(
    build.Experiment,
    seed=seed,
    tokenizer=model.tokenizer,
    model=run.model_for(method),
    mesh=ConfigDict({**model.mesh, 'data': 1}) if smoke else model.mesh,
    phases=phases,
    order=tuple(phases),
    evaluation=evaluation,
    trackers=_trackers(trackers or ('none' if smoke else 'tensorboard')),
  )


@dataclasses.dataclass(frozen=True)
class _Run:
  """A task and a model, and the sizes of this run."""

  task: Task
  preset: Preset
  steps: int
  learning_rate: float
  prompts: int
  smoke: bool

  def make(self, function: Callable[..., Method]) -> Method:
    """Calls a method function with the budgets that it names."""
    known = {
      'max_new_tokens': self.task.max_new_tokens,
      'samples_per_prompt': self.samples_per_prompt,
      'candidates': self.task.candidates,
      'steps': self.steps,  # of the whole run, also where a smoke run makes two
      'learning_rate': self.learning_rate or self.preset.learning_rates['reinforce'],
      'supervised_rate': self.learning_rate or self.preset.learning_rates['imitate'],
    }
    wanted = inspect.signature(function).parameters
    return function(**{k: v for k, v in known.items() if k in wanted})

  @property
  def total_steps(self) -> int:
    return SMOKE['steps'] if self.smoke else self.steps

  @property
  def samples_per_prompt(self) -> int:
    size = self.task.samples_per_prompt
    return min(size, SMOKE['samples_per_prompt']) if self.smoke else size

  @property
  def prompt_length(self) -> int:
    own = self.task.prompt_length + len(self.task.prefix.encode())
    return own + self.preset.template_tokens

  @property
  def length(self) -> int:
    own = self.task.length or self.task.prompt_length + self.task.max_new_tokens
    return own + self.preset.template_tokens

  def row_length(self, method: Method) -> int:
    """Tokens of a row of given completions; some collectors put another one before it."""
    return method.collect.func.longest_row(self.length, method.collect.keywords)

  def longest_prompt(self, method: Method, *, sampled: bool = False) -> int:
    """Tokens of a prompt, see `Collector.longest_prompt`."""
    collector = method.collect
    sizes = self.prompt_length, self.task.max_new_tokens, self.preset.chat
    return collector.func.longest_prompt(*sizes, collector.keywords, sampled=sampled)

  def source(self, source: ConfigDict) -> ConfigDict:
    """The source as the model reads it: in a chat template or not."""
    if not self.preset.chat:
      return source
    return part(sources.as_chat, source=source, system=self.task.system)

  def records(
    self, method: Method, source: ConfigDict, more: ConfigDict | None = None
  ) -> ConfigDict:
    """The source as the method reads it; `more` are records that may be read beside it."""
    if method.source is None:
      return self.source(source)
    wrap = method.source
    beside = (
      {} if more is None or 'more' not in knobs_of(wrap.func) else {'more': self.source(more)}
    )
    given = {
      k: self.source(x) if isinstance(x, ConfigDict) else x for k, x in wrap.keywords.items()
    }
    return part(wrap.func, source=self.source(source), **beside, **given)

  def phase(self, method: Method, *, teacher: str = '') -> ConfigDict:
    """The phase of a method."""
    task, needs = self.task, method.needs
    scaled = {
      name: weighted(method.reward_scale * spec.weight, _without_weight(spec))
      for name, spec in task.rewards.items()
    }
    frozen = {'teacher': part(models.pretrained, path=teacher)} if teacher else {}
    return part(
      build.Phase,
      steps=self.total_steps if self.smoke else method.steps or self.total_steps,
      plateau=method.plateau,
      plateau_metric=method.plateau_metric,
      source=self.records(method, getattr(task, needs)),
      collect=self.collector(method),
      credit=method.credit,
      objective=method.objective,
      reward=scaled | dict(method.rewards) if needs == 'problems' else {},
      **({} if method.combine is None else {'combine': method.combine}),
      optimizer=method.optimizer or part(optim.adamw, learning_rate=self.rate(method)),
      anchors=dict(method.anchors),
      learned=dict(method.learned),
      networks=dict(method.networks),
      further=dict(method.further),
      frozen=frozen,
      restart=method.restart and not teacher,
      epochs=method.epochs,
      minibatches=method.minibatches,
      curriculum=method.curriculum or part(curricula.epochs),
      **({} if issubclass(method.collect.func, collect.Sampling) else self.held_out(method)),
    )

  def held_out(self, method: Method) -> dict[str, Any]:
    """What a phase measures on records that it does not train on."""
    task, needs = self.task, method.needs
    source = None if needs == 'problems' else getattr(task, f'held_out_{needs}')
    if source is None:
      return {}
    return {
      'held_out': {needs: self.records(method, source, more=getattr(task, needs))},
      'held_out_every': task.evaluate_every,
      'held_out_records': SMOKE['held_out'] if self.smoke else task.held_out_problems,
    }

  def rate(self, method: Method) -> float:
    usual = {'problems': 'reinforce', 'demonstrations': 'imitate'}.get(method.needs, 'preference')
    base = self.learning_rate or self.preset.learning_rates[method.learns or usual]
    return float(f'{method.learning_rate * base:.6g}')

  def collector(self, method: Method) -> ConfigDict:
    """The method's collector, with the budgets of the task where the method asks for none."""
    task, kind = self.task, method.collect.func
    asked = dict(method.collect.keywords)
    samples = asked.get('samples_per_prompt', self.samples_per_prompt)
    prompts = self.prompts or max(task.rows // samples, 1)
    rows, pairs = task.demonstration_rows, task.pairs_per_batch
    if kind is collect.Feedback:
      rows = 2 * pairs
    lists = max(2 * pairs // task.candidates, 1)
    if self.smoke:
      asked['samples_per_prompt'] = samples = min(samples, SMOKE['samples_per_prompt'])
      prompts = min(prompts, SMOKE['prompts'])
      rows, pairs = min(rows, SMOKE['demonstration_rows']), min(pairs, SMOKE['pairs'])
      lists = min(lists, SMOKE['lists'])
      first = {'sample_first', 'sample_first_most'} & asked.keys()
      asked |= {name: min(asked[name], SMOKE['first']) for name in first}
    length = self.row_length(method)
    budgets = {
      'prompts': prompts,
      'samples_per_prompt': samples,
      'prompt_length': self.longest_prompt(method),
      'max_new_tokens': task.max_new_tokens,
      'temperature': task.temperature,
      'resample_ignores': tuple(method.rewards),
      'rows': rows,
      'pairs': pairs,
      'lists': lists,
      'candidates': task.candidates,
      'length': length,
      'overlong': task.overlong,
      'unusable': task.unusable,
      'prefix': task.prefix,
      'stop_strings': task.stop_strings,
      **task.turns,
    }
    if issubclass(kind, collect.Given):
      budgets.pop('prompt_length')
    knobs = part(kind).keys()
    return part(kind, **{k: v for k, v in (budgets | asked).items() if k in knobs})

  def model_for(self, method: Method) -> ConfigDict:
    """The preset's model, long enough for the rows, with a value head if the method reads values."""
    model = ConfigDict(self.preset.model)
    base = model.base if 'base' in model else model
    sampled = self.longest_prompt(method, sampled=True) + self.task.max_new_tokens
    base.max_length = max(base.max_length, self.row_length(method), sampled)
    credited, objective = method.bound()
    of_anchors = [
      bind(one, table('learner', learner.Learned), 'method.learned').objective.requires
      for one in method.learned.values()
    ]
    read = objective.requires.union(credited.requires, *of_anchors)
    if read & build.VALUES or any(name.endswith('_head_score') for name in read):
      base.value_head = True
    if self.smoke and 'num_layers' in base:
      base.update(num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64)
    return model

  def evaluation(self, method: Method) -> ConfigDict:
    task = self.task
    behind = method.collect.func.asks_behind(method.collect.keywords)
    phases = {**method.before, 'train': method}
    labelled = [k for k, m in phases.items() if m.collect.func.asks_behind(m.collect.keywords)]
    if task.held_out is None or not task.judged:
      return part(build.Never)
    limit = SMOKE['held_out'] if self.smoke else task.held_out_problems
    return part(
      build.HeldOut,
      every=task.evaluate_every,
      source=self.source(task.held_out),
      reward=dict(task.rewards),
      problems=limit,
      batch=min(limit, task.evaluation_batch),
      prompt_length=self.prompt_length + behind.get('label_length', 0),
      max_new_tokens=task.max_new_tokens,
      overlong=task.overlong,
      prefix=task.prefix,
      stop_strings=task.stop_strings,
      **behind,
      label_phases=tuple(labelled),
      **task.turns | task.held_out_turns,
    )


def _move_teacher(phase: ConfigDict, teacher: str, devices: int, url: str) -> None:
  """Takes the teacher off the devices of the run, in place.

  Raises:
    ValueError: both places are named, or no teacher, or the method has none.
  """
  if devices and url:
    raise ValueError('teacher_devices and teacher_url: the teacher is at one of the two')
  if not teacher or 'teacher' not in phase.anchors:
    raise ValueError(
      'teacher_devices or teacher_url: name the model with teacher=..., for a method with a teacher'
    )
  if url:
    listed = _list_divergences(phase.objective)
    place = part(teachers.service, model=teacher, url=url)
    place.top = listed or place.top
  else:
    place = part(teachers.on_devices, path=teacher, devices=devices)
  del phase.anchors['teacher']
  phase.frozen = {}
  phase.elsewhere = {'teacher': place}


def _list_divergences(spec: ConfigDict) -> int:
  """Makes divergences of whole distributions those of the tokens that a service lists, in place.

  The tokens of a `top_k` are then always the teacher's. Returns the largest k of these, 0 without one.
  """
  listed = 0
  for name, value in spec.items():
    if not isinstance(value, ConfigDict):
      continue
    kind = value.get('name')
    if kind == 'divergences.top_k':
      given = dict(divergence=value.divergence, bucket=value.bucket)
      listed = max(listed, value.k)
    elif kind in divergences.FULL:
      given = dict(divergence=ConfigDict(_without_weight(value)))
    else:
      listed = max(listed, _list_divergences(value))
      continue
    made = part(divergences.listed, **given)
    spec[name] = weighted(value.weight, made) if 'weight' in value else made
  return listed


def _trackers(names: str) -> dict[str, ConfigDict]:
  """The trackers of these names, with their defaults."""
  if names == 'none':
    return {}
  return {name: part(find(name, tracking.TABLE, 'option trackers')) for name in names.split('+')}


def _without_weight(spec: Mapping) -> dict:
  return {k: v for k, v in spec.items() if k != 'weight'}


def _check_fit(method: Method, task: Task, warm_start: int) -> None:
  """Refuses a task that lacks what the method needs; the message names tasks and methods that fit."""
  if method.needs not in task.has:
    raise ValueError(
      f'the method needs {method.needs}, but the task has {list(task.has)}; '
      f'tasks with {method.needs}: {_examples(method.needs)}'
    )
  rewarded = task.judged or bool(method.rewards) or method.collect.func.judges
  if method.needs == 'problems' and 'rewards' in method.reads and not rewarded:
    raise ValueError(
      'the method learns from rewards, but the task has no verifier; name one with '
      f'reward=..., valid: {sorted(k.partition(".")[2] for k in REWARDS)}'
    )
  asked = method.collect.keywords
  for name in ('demonstrations', 'others', 'beginning', 'preferences'):
    if asked.get(name) and task.environment is not None:
      raise ValueError(
        f'the method adds completions of the data to its groups ({name}), which have no turns of the '
        "task's environment; take a method that samples alone"
      )
  answers = asked.get('demonstrations') or asked.get('beginning')
  if answers and 'demonstrations' not in task.has:
    raise ValueError('the method learns from the answers in the data, but the records have none')
  if warm_start and 'demonstrations' not in task.has:
    raise ValueError(
      'the model is not pretrained, so it first learns from answers in the data, but the records have '
      'none; use warm_start=0 or a pretrained model'
    )


def _examples(need: str) -> str:
  fields = {
    'problems': 'prompt',
    'pairs': 'chosen and rejected',
    'demonstrations': 'answer',
    'feedback': 'completion and label',
    'lists': 'completions and rewards',
  }
  made = [name for name in ('addition', 'choices', 'chain_sum') if need in tasks.TABLE[name]().has]
  return f'{", ".join(made)}, and jsonl or hub with records that have {fields[need]}'
