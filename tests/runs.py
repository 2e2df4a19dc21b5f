"""Configurations that several tests start from: methods on two-digit addition with the tiny model."""

import dataclasses

from ml_collections import ConfigDict

from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.methods import Method
from polgrad.options import from_text


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


def method_of(name: str) -> Method:
  """A method with the budgets that it has in a run on addition."""
  budgets = dict(
    max_new_tokens=5, samples_per_prompt=8, candidates=4, steps=150, learning_rate=1e-4
  )
  function = methods.TABLE[name]
  wanted = function.__kwdefaults__ or {}
  names = {*wanted, *function.__code__.co_varnames[: function.__code__.co_kwonlyargcount]}
  return function(**{k: v for k, v in budgets.items() if k in names})
