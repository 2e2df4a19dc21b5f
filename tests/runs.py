"""Configurations that several tests start from: methods on two-digit addition with the tiny model."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Hashable

from ml_collections import ConfigDict

from polgrad import methods, phases, presets, tasks, train
from polgrad.collect import drawn
from polgrad.compose import compose
from polgrad.methods import Method
from polgrad.options import from_text
from polgrad.sampling import engines


@dataclasses.dataclass(frozen=True)
class Run:
  """A method by name, with the interface of a config file."""

  name: str

  def get_config(self, text: str = '') -> ConfigDict:
    return from_text(f'method={self.name},task=addition,model=tiny,{text}')


dpo, grpo, hpt, ipo, on_policy_distillation, ppo, sft = (
  Run(name) for name in ('dpo', 'grpo', 'hpt', 'ipo', 'on_policy_distillation', 'ppo', 'sft')
)


def addition(
  method: Method, *, rewards: dict | None = None, warm_start: int = 0, **phase
) -> ConfigDict:
  """A smoke run of a method; `phase` changes values of its phase, `rewards` are other verifiers."""
  task = tasks.addition()
  if rewards is not None:
    task = dataclasses.replace(task, rewards=rewards)
  config = compose(
    method, task, presets.tiny(alphabet=task.alphabet), warm_start=warm_start, smoke=True
  )
  config.phases.train.update(phase)
  config.evaluation.reward = ConfigDict(dict(tasks.addition().rewards))  # accuracy alone
  return config


def method_of(name: str, **knobs) -> Method:
  """A method with the budgets that it has in a run on addition, and other constants if given."""
  budgets = dict(
    max_new_tokens=5,
    samples_per_prompt=8,
    candidates=4,
    steps=150,
    learning_rate=1e-4,
    supervised_rate=1e-4,
  )
  function = methods.TABLE[name]
  names = inspect.signature(function).parameters
  return function(**{k: v for k, v in budgets.items() if k in names} | knobs)


def share_programs(patch: Callable = setattr) -> None:
  """From now on, runs whose phases have equal settings use the compiled functions of the first of them.

  Args:
    patch: (module, name, value) -> None, such as `monkeypatch.setattr`.
  """
  configs, programs = {}, {}
  build, start = train.build, phases.start_phase

  def built(config):
    experiment = build(config)
    configs[id(experiment)] = experiment, json.loads(ConfigDict(config).to_json_best_effort())
    return experiment

  def started(experiment, state, logs):
    if id(experiment) not in configs:
      return start(experiment, state, logs)
    config, index = configs[id(experiment)][1], int(state.phase)
    name = experiment.order[index]
    shared = ('model', 'tokenizer', 'mesh', 'sampler_mesh', 'engine', 'seed', 'evaluation')
    read = [config[key] for key in shared]
    key = json.dumps([index, {**config['phases'][name], 'steps': 0}, *read], sort_keys=True)
    if key not in programs:
      programs[key] = start(experiment, state, logs)
    own = dict(experiment=experiment, phase=experiment.phases[name], logs=logs)
    return dataclasses.replace(programs[key], **own)

  patch(train, 'build', built)
  patch(phases, 'start_phase', started)


def share_samplers(patch: Callable = setattr) -> None:
  """From now on, collectors with the same model and settings of sampling share a compiled sampler.

  What answers, scores and reads the rows is not part of it.
  """

  def once(make):
    made = {}

    def sampler(policies, *, default, **settings):
      # The text of a table of stops leaves out most of it, and a model that a test made up has no key.
      if settings.get('stop_table') is not None or not isinstance(default.config, Hashable):
        return make(policies, default=default, **settings)
      models = {name: policy.config for name, policy in policies.items()}
      key = default.config, repr(sorted(models.items())), repr(sorted(settings.items()))
      if key not in made:
        made[key] = make(policies, default=default, **settings)
      return made[key]

    return sampler

  for module, name in ((engines, 'make_sampler'), (drawn, 'make_turn_sampler')):
    patch(module, name, once(getattr(module, name)))
